"""What can be refused before a run from its settings, dataset, ranks and folder.

Each check is written once: the trainer raises it (`refuse`), the doctor prints it. One takes a Plan and returns what it
found to be in order, or raises UserError; another one is a function and a line of CHECKS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn

from pipeline.checks.user_networks import check_user_networks
from pipeline.config import Config, check_device, flatten, imported
from pipeline.config.yaml_files import read_yaml
from pipeline.data import Dataset, check_source, source_kind
from pipeline.distributed.tracking import check_trackers
from pipeline.errors import UserError
from pipeline.evaluation.selection import named_score
from pipeline.models.objectives import choose
from pipeline.models.user_networks import build_critic, build_generator
from pipeline.storage.checkpoint import committed
from pipeline.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """A run that is about to start."""

    config: Config
    world_size: int
    dataset: Dataset | None = None
    """None while it is not prepared: what depends on it is not checked."""
    has_cuda: bool = field(default_factory=torch.cuda.is_available)

    def num_classes(self, dataset: Dataset) -> int:
        """That the networks are told of."""
        return dataset.num_classes if choose(self.config.training).classifies else 0

    def networks(self, dataset: Dataset) -> tuple[nn.Module, nn.Module]:
        """Generator and critic. The reference's are on torch's meta device, where they have sizes but take no memory.
        Raises UserError for unfit images, and for code of the user's that fails."""
        dtype = torch.float64 if self.config.runtime.precision == "float64" else torch.float32
        network = self.config.network
        given = network, dataset.image_shape, self.num_classes(dataset)
        # Code of the user's may look at numbers, which there are none of on the meta device.
        with torch.device("meta" if network.generator is None else "cpu"):
            generator = build_generator(*given).to(dtype)
        with torch.device("meta" if network.critic is None else "cpu"):
            return generator, build_critic(*given).to(dtype)


def refuse(plan: Plan) -> None:
    """Raises the first UserError of any check."""
    for check in CHECKS.values():
        check(plan)


def check_runtime(plan: Plan) -> str:
    runtime = plan.config.runtime
    check_device(runtime, plan.has_cuda)
    return f"device {runtime.device}, precision {runtime.precision}"


def check_tracker_names(plan: Plan) -> str:
    return check_trackers(plan.config.run.trackers, plan.config.run.tracker_options)


def check_objective(plan: Plan) -> str:
    """The keys that go with an objective, and the labels that it may need."""
    training, dataset = plan.config.training, plan.dataset
    if choose(training).classifies and dataset is not None and dataset.num_classes < 2:
        raise UserError(f"training.objective is {training.objective}, but {dataset.name} has no labels")
    if plan.config.evaluation.gan_train and not choose(training).classifies:
        raise UserError(
            f"evaluation.gan_train is true, but training.objective {training.objective} makes images of no class: "
            "set it to false, or use acgan or acwgan"
        )
    return training.objective


def check_shares(plan: Plan) -> str:
    """The batch among ranks and micro-batches, and the lanes of a streamed dataset among ranks and workers."""
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
    """Whether the networks take images of this size, and those of the user's own do what is asked of them."""
    for role in ("generator", "critic"):
        if name := getattr(plan.config.network, role):
            imported(f"network.{role}", name)
    if plan.dataset is None:
        return ""
    check_user_networks(plan.config, plan.dataset.image_shape, plan.num_classes(plan.dataset))
    generator, critic = (sum(weight.numel() for weight in one.parameters()) for one in plan.networks(plan.dataset))
    return f"{generator:,} parameters of the generator, {critic:,} of the critic"


def check_selection(plan: Plan) -> str:
    """The score that run.keep_best names, and the evaluations that give it."""
    run, every = plan.config.run, plan.config.evaluation.every
    if run.keep_best is None:
        if run.patience is not None:
            raise UserError(f"run.patience is {run.patience}, but run.keep_best names no score: set it, e.g. to fid")
        return ""
    if every is None:
        raise UserError(f"run.keep_best is {run.keep_best}, but evaluation.every is null: set it to a number of steps")
    space, key = named_score(run.keep_best, plan.config.evaluation.features)
    return f"{space} {key} of an evaluation every {every} steps"


def check_run_folder(plan: Plan) -> str:
    """Whether the run's folder is free, or holds this very run."""
    folder, dataset = RunFolder(plan.config.folder), plan.dataset
    names = {path.name for path in folder.path.iterdir()} if folder.path.is_dir() else set()
    if folder.export.exists() and not folder.checkpoints.is_dir():
        raise UserError(
            f"{folder.path}: holds a finished run without its {folder.checkpoints.name}/: starting it again would "
            "overwrite its results; put the checkpoints back, or use another run.name"
        )
    if not any(name for name in names if not name.startswith(".") and name != folder.environment.name):
        return f"{folder.path} is free"
    try:
        saved = read_yaml(folder.config)
        fingerprint = json.loads(folder.environment.read_text())["dataset_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        text = "is not empty and holds no run that can be read: use another run.name"
        raise UserError(f"{folder.path}: {text}") from None
    differences = _differences(saved, plan.config)
    if differences and not committed(folder) and not folder.has_results():
        return f"{folder.path} holds a run that got nowhere, whose settings are replaced"
    if differences:
        raise UserError(
            f"{folder.path}: holds a run with other settings ({'; '.join(differences)}): "
            "give those settings, or another run.name"
        )
    if dataset is not None and fingerprint != dataset.fingerprint:
        raise UserError(f"{folder.path}: was trained on another version of {dataset.name}: use another run.name")
    return f"{folder.path} holds this run, which will go on"


def _differences(saved: Any, config: Config) -> list[str]:
    """Of the settings that may not change between two launches. One that is younger than the saved run had its default
    there."""
    given, defaults = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(each, free=False).items()}
        for each in (config, Config())
    )

    def saved_value(key: str) -> Any:
        return reduce(
            lambda at, part: at.get(part, defaults[key]) if isinstance(at, dict) else at, key.split("."), saved
        )

    return [
        f"{key} is {before} there and {value} here"
        for key, value in given.items()
        if (before := saved_value(key)) != value
    ]


CHECKS: dict[str, Callable[[Plan], str]] = {
    "runtime": check_runtime,
    "run.trackers": check_tracker_names,
    "training.objective": check_objective,
    "training": check_shares,
    "network": check_networks,
    "run.keep_best": check_selection,
    "run.name": check_run_folder,
}
"""By what the doctor calls its line."""
