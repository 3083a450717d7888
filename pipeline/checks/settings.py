"""What is refused before a run, from its settings, dataset, number of ranks and folder.

Each check is written once: the trainer raises its error (`refuse`), the doctor prints it. A check takes a Plan and
returns a line about what is in order ("" if there is nothing to say), or raises UserError. A new one is a function and
its line in CHECKS.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.config import Config, flatten, import_object, read_yaml
from pipeline.data import Dataset, check_source, source_kind
from pipeline.distributed.process import check_trackers, choose_device
from pipeline.errors import UserError
from pipeline.models.networks import build_for_sizes, dtype_of
from pipeline.models.objectives import choose, is_conditional
from pipeline.storage.checkpoint import committed
from pipeline.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """A run that is about to start."""

    config: Config
    world_size: int
    dataset: Dataset | None = None
    """The dataset; None while it is not prepared, and then nothing that depends on it is checked."""

    def num_classes(self, dataset: Dataset) -> int:
        """Returns the number of classes that the networks are conditioned on; 0 for an unconditional GAN."""
        return dataset.num_classes if is_conditional(choose(self.config.training)) else 0

    def networks(self, dataset: Dataset) -> tuple[nn.Module, nn.Module]:
        """Returns generator and critic to look at their sizes, not at their weights. Raises UserError if they do not
        take images of this size, or if the user's code fails."""
        return build_for_sizes(self.config, dataset.image_shape, self.num_classes(dataset))


def refuse(plan: Plan) -> None:
    """Raises the first UserError of any check."""
    for check in CHECKS.values():
        check(plan)


def check_runtime(plan: Plan) -> str:
    runtime = plan.config.runtime
    choose_device(runtime, torch.cuda.is_available())
    return f"device {runtime.device}, precision {runtime.precision}"


def check_objective(plan: Plan) -> str:
    """Checks the keys that go with an objective, one of the user's own, and that there are labels if it needs them."""
    training, dataset = plan.config.training, plan.dataset
    objective = choose(training)
    if ":" in training.objective:
        from pipeline.models.user_networks import check_user_objective

        check_user_objective(training.objective, objective, dtype_of(plan.config))
    if is_conditional(objective) and dataset is not None and dataset.num_classes < 2:
        plain = training.objective.removeprefix("ac").removeprefix("c")  # the same losses without classes
        fix = "leave out classifies=True or projects=True" if ":" in plain else f"take --training.objective {plain}"
        reason = "one class alone" if dataset.num_classes else "no labels"
        raise UserError(f"training.objective is {training.objective}, but {dataset.name} has {reason}: {fix}")
    if plan.config.evaluation.gan_train and not is_conditional(objective):
        raise UserError(
            f"evaluation.gan_train is true, but training.objective {training.objective} makes images of no class: "
            "set it to false, or use acgan, acwgan or crpgan"
        )
    return training.objective


def check_shares(plan: Plan) -> str:
    """Checks that ranks and micro-batches can share a batch, and ranks and workers the lanes of a streamed dataset."""
    config, dataset, batch_size = plan.config, plan.dataset, plan.config.training.batch_size
    check_source(config, dataset, plan.world_size)
    share, micro_batches, lanes = batch_size // plan.world_size, config.runtime.accumulation, config.data.lanes
    if share % micro_batches:
        raise UserError(
            f"runtime.accumulation is {micro_batches}: it does not divide the {share} images that a rank takes of "
            f"training.batch_size {batch_size}"
        )
    streamed = dataset is not None and source_kind(config.data, dataset) == "streaming"
    text = f", data.lanes {lanes} are {lanes // plan.world_size}" if streamed else ""
    return f"training.batch_size {batch_size} is {share} a rank{text}"


def check_networks(plan: Plan) -> str:
    """Checks that the networks take images of this size, and that the user's own do what is asked of them."""
    for role in ("generator", "critic"):
        if name := getattr(plan.config.network, role):
            import_object(f"network.{role}", name)
    if plan.dataset is None:
        return ""
    if plan.config.network.generator or plan.config.network.critic:
        from pipeline.models.user_networks import check_user_networks

        check_user_networks(plan.config, plan.dataset.image_shape, plan.num_classes(plan.dataset))
    generator, critic = (sum(weight.numel() for weight in one.parameters()) for one in plan.networks(plan.dataset))
    return f"{generator:,} parameters of the generator, {critic:,} of the critic"


def check_selection(plan: Plan) -> str:
    """Checks that the evaluations give the score that run.keep_best names."""
    run, every = plan.config.run, plan.config.evaluation.every
    if run.keep_best is None:
        if run.patience is not None:
            raise UserError(f"run.patience is {run.patience}, but run.keep_best names no score: set it, e.g. to fid")
        return ""
    if every is None:
        raise UserError(f"run.keep_best is {run.keep_best}, but evaluation.every is null: set it to a number of steps")
    from pipeline.evaluation.selection import named_score

    space, key = named_score(run.keep_best, plan.config.evaluation.features)
    return f"{space} {key} of an evaluation every {every} steps"


def check_run_folder(plan: Plan) -> str:
    """Checks that the run's folder is free, or holds this very run."""
    folder, dataset, fingerprint = RunFolder(plan.config.folder), plan.dataset, None
    if folder.export.exists() and not folder.checkpoints.is_dir():
        raise UserError(
            f"{folder.path}: holds a finished run without its {folder.checkpoints.name}/: starting it again would "
            "overwrite its results; put the checkpoints back, or use another run.name"
        )
    if not {path.name for path in folder.path.glob("[!.]*")} - {folder.environment.name}:
        return f"{folder.path} is free"
    with contextlib.suppress(UserError, RecursionError):
        saved, fingerprint = read_yaml(folder.config), folder.dataset_fingerprint
    if fingerprint is None:
        raise UserError(f"{folder.path}: is not empty and holds no run that can be read: use another run.name")
    differences = _differences(saved, plan.config)
    if differences and not committed(folder) and not folder.has_results:
        return f"{folder.path} holds a run that got nowhere, whose settings are replaced"
    if differences:
        raise UserError(
            f"{folder.path}: holds a run with other settings ({'; '.join(differences)}): "
            "give those settings, or another run.name"
        )
    if dataset is not None and fingerprint != dataset.fingerprint:
        raise UserError(f"{folder.path}: was trained on another version of {dataset.name}: use another run.name")
    if folder.export.exists() and max(folder.saved_steps(), default=0) >= plan.config.training.steps:
        return f"{folder.path} holds this run, which has its steps already: for more, raise training.steps"
    return f"{folder.path} holds this run, which will go on"


def _differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Lists settings that differ from the saved run's and must not. A setting that the saved run does not know counts
    as its default."""
    settings, defaults = (json.loads(json.dumps(flatten(one, free=False))) for one in (config, Config()))  # no tuples
    differences = []
    for key, value in settings.items():
        before: Any = saved
        for part in key.split("."):
            before = before.get(part, defaults[key]) if isinstance(before, dict) else before
        if before != value:
            shown, here = ("null" if item is None else item for item in (before, value))
            differences.append(f"{key} is {shown} there and {here} here")
    return differences


CHECKS: dict[str, Callable[[Plan], str]] = {
    "runtime": check_runtime,
    "run.trackers": lambda plan: check_trackers(plan.config.run),
    "training.objective": check_objective,
    "training": check_shares,
    "network": check_networks,
    "run.keep_best": check_selection,
    "run.name": check_run_folder,
}
"""The checks, by the subject that the doctor prints."""
