"""One table of runs that must not start: the trainer raises what the doctor prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml

from pipeline.checks.machine import examine
from pipeline.checks.settings import Plan, refuse
from pipeline.config import Config, DataConfig, EvaluationConfig, RunConfig, RuntimeConfig, to_yaml
from pipeline.data import Dataset, load_dataset
from pipeline.data.dataset import to_json
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.storage.run_folder import RunFolder

T = TypeVar("T")


class Pretended(Ranks):
    """Rank 0 of as many as one likes; the others agree with it."""

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def any(self, flag: bool) -> bool:
        return flag


@dataclass(frozen=True)
class Bad:
    """What is wrong with a run, and the words in which it is refused."""

    message: str
    """A regular expression that matches all of it."""
    settings: dict[str, dict[str, Any]]
    """Section -> key -> value, against `sound`."""
    world_size: int = 1
    dataset: dict[str, Any] | None = None
    """What is different about the dataset."""
    prepare: Callable[[RunFolder, Config], None] = lambda folder, config: None
    """What lies in the run's folder before."""
    subject: str = "training"
    """Of the doctor's line."""


def a_letter(folder: RunFolder, config: Config) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "letter.txt").write_text("not a run")


def another_run(folder: RunFolder, config: Config) -> None:
    saved_run(folder, replace(config, training=replace(config.training, seed=7)), "")


def a_run_on_other_images(folder: RunFolder, config: Config) -> None:
    saved_run(folder, config, "another")


def a_run_without_fingerprint(folder: RunFolder, config: Config) -> None:
    saved_run(folder, config, "")
    folder.environment.write_text("{}")


def a_finished_run_without_checkpoints(folder: RunFolder, config: Config) -> None:
    saved_run(folder, config, "")
    folder.export.parent.mkdir()
    folder.export.touch()


def another_run_that_logged(folder: RunFolder, config: Config) -> None:
    another_run(folder, config)
    folder.append_metrics({"step": 1})


def saved_run(folder: RunFolder, config: Config, fingerprint: str) -> None:
    folder.path.mkdir(parents=True)
    folder.config.write_text(to_yaml(config))
    folder.environment.write_text(json.dumps({"dataset_fingerprint": fingerprint}))


FREE = {"clip_value": None}
ODD_NETWORKS = {
    "generator": {
        "Missing": r" is 'tests.odd_networks:Missing': module .* has no attribute .*",
        "Picky": r": .*:Picky could not be made \(KeyError: 'hidden'\)",
        "Failing": r" was given torch.float32 \[4, 100\] and torch.int64 \[4\] and failed \(.*: no such layer\)",
        "Tall": r" gives images of shape \[4, 1, 16, 4\], where \[4, 1, 8, 8\] are .*",
        "Noisy": r" draws random numbers when it is called \(dropout, noise\), .*",
        "Bright": r" makes pixels from 5 to 6: end it in \[0, 1\], with a sigmoid say",
        "Idle": r": the parameter spare has no part in what it gives, or is frozen: .*",
        "Frozen": r": the parameter layer.bias has no part .* or is frozen: .*",
        "Constant": r" gives what no parameter has a part in: there is nothing to .*",
        "Cumulative": r": norm is BatchNorm1d\(.*momentum=None.*\): over several .*",
    },
    "critic": {
        "number": r": .*:number could not be made \(TypeError: 'int' object is not callable\)",
        "nothing": r" is '.*:nothing': that makes a NoneType, not a torch.nn.Module",
        "ScoresAlone": r" was given .* and failed \(TypeError: it must return two things: scores .*\)",
        "Column": r" gives scores of shape \[4, 1\], where \[4\] are expected",
        "Sorting": r" gives logits, but there are no classes to tell apart: give None",
    },
}
TABLE = {
    "a GPU that is not there": Bad(
        r"runtime.device is cuda, but torch sees no CUDA device: use cpu or auto",
        {"runtime": {"device": "cuda"}},
        subject="runtime",
    ),
    "fp16 on a CPU": Bad(
        r"runtime.precision is fp16, which takes a CUDA device: .*",
        {"runtime": {"precision": "fp16"}},
        subject="runtime",
    ),
    "a graph on a CPU": Bad(
        r"runtime.cuda_graph is true, which takes a CUDA device .*",
        {"runtime": {"cuda_graph": True}},
        subject="runtime",
    ),
    "no such objective": Bad(
        r"training.objective is 'hinge': choose one of wgan, .*",
        {"training": {"objective": "hinge"}},
        subject="training.objective",
    ),
    "clipping is missing": Bad(
        r"training.clip_value is null: the objective wgan needs a number",
        {"training": FREE},
        subject="training.objective",
    ),
    "clipping is too much": Bad(
        r"training.clip_value is 0.01: the objective lsgan does not use it, .*",
        {"training": {"objective": "lsgan"}},
        subject="training.objective",
    ),
    "a penalty in separate updates": Bad(
        r"training.critic_updates is separate: a gradient penalty needs joint updates",
        {"training": {"objective": "wgan_gp", "gradient_penalty": 10.0, "critic_updates": "separate", **FREE}},
        subject="training.objective",
    ),
    "R1 in separate updates": Bad(
        r"training.critic_updates is separate: a gradient penalty needs joint updates",
        {"training": {"r1_penalty": 10.0, "critic_updates": "separate"}},
        subject="training.objective",
    ),
    "R2 in separate updates": Bad(
        r"training.critic_updates is separate: a gradient penalty needs joint updates",
        {"training": {"r2_penalty": 10.0, "critic_updates": "separate"}},
        subject="training.objective",
    ),
    "pairs in separate updates": Bad(
        r"training.critic_updates is separate: the objective rpgan compares real with fake scores, which needs .*",
        {"training": {"objective": "rpgan", "critic_updates": "separate", **FREE}},
        subject="training.objective",
    ),
    "a penalty that is none and falls": Bad(
        r"training.penalty_annealing is 10: there is no penalty, set it to null",
        {"training": {"penalty_annealing": 10}},
        subject="training.objective",
    ),
    **{
        f"an objective of one's own: {name}": Bad(
            rf"training.objective tests.odd_networks:{name}: {message}",
            {"training": {"objective": f"tests.odd_networks:{name}", **FREE}},
            subject="training.objective",
        )
        for name, message in {
            "unreduced": r"fake_loss returns shape \[4\]: return a scalar tensor, such as the mean \(.mean\(\)\)",
            "of_numbers": r"generator_loss returns a float: return a scalar tensor, .*",
            "of_one": r"critic_loss was given torch.float32 \[4\] and torch.float32 \[4\] and failed \(TypeError: .*",
        }.items()
    },
    **{
        f"projecting: {name}": Bad(
            rf"training.objective is 'tests.odd_networks:{name}': projects=True goes with neither classifies=True, .*",
            {"training": {"objective": f"tests.odd_networks:{name}", **FREE}},
            subject="training.objective",
        )
        for name in ("both_ways", "between_classes")
    },
    **{
        f"{objective} of {count} classes": Bad(
            rf"training.objective is {objective}, but tiny has {reason}: {fix}",
            {"training": {"objective": objective, "clip_value": 0.01 if objective == "acwgan" else None}},
            dataset={"class_names": ("one",)[:count]},
            subject="training.objective",
        )
        for objective, count, reason, fix in (
            ("acgan", 0, "no labels", "take --training.objective gan"),
            ("acwgan", 1, "one class alone", "take --training.objective wgan"),
            ("tests.odd_networks:sound", 0, "no labels", "leave out classifies=True or projects=True"),
            ("crpgan", 0, "no labels", "take --training.objective rpgan"),
        )
    },
    "learning from images of no class": Bad(
        r"evaluation.gan_train is true, but training.objective wgan makes images of no class: set it to false, or .*",
        {"evaluation": {"gan_train": True}},
        subject="training.objective",
    ),
    "a batch that two can't share": Bad(
        r"training.batch_size 63 cannot be shared among 2 processes: choose .*",
        {"training": {"batch_size": 63}},
        world_size=2,
    ),
    "micro-batches that don't divide the batch": Bad(
        r"runtime.accumulation is 3: it does not divide the 64 images that a rank takes of training.batch_size 64",
        {"runtime": {"accumulation": 3}},
    ),
    "micro-batches that don't divide a rank's share": Bad(
        r"runtime.accumulation is 64: it does not divide the 32 images .*",
        {"runtime": {"accumulation": 64}},
        world_size=2,
    ),
    "more ranks than lanes": Bad(
        r"data.lanes 8 cannot be shared evenly at world size 16, .*",
        {"data": {"source": "streaming", "lanes": 8}},
        world_size=16,
    ),
    "a batch of more than all images": Bad(
        r"training.batch_size 608 is more than the 600 training images of tiny: lower it",
        {"training": {"batch_size": 608}},
    ),
    "images that can't be doubled into": Bad(
        r"images of 10 x 8 \(height x width\): .* \(prepare the dataset with --size 8 or --size 12\)",
        {},
        dataset={"image_shape": (1, 10, 8)},
        subject="network",
    ),
    **{
        f"a network of one's own: {name}": Bad(
            rf"network.{role}{message}", {"network": {role: f"tests.odd_networks:{name}"}}, subject="network"
        )
        for role, messages in ODD_NETWORKS.items()
        for name, message in messages.items()
    },
    "patience for no score": Bad(
        r"run.patience is 3, but run.keep_best names no score: set it, e.g. to fid",
        {"run": {"patience": 3}},
        subject="run.keep_best",
    ),
    "the best of no evaluations": Bad(
        r"run.keep_best is fid, but evaluation.every is null: set it to a number of steps",
        {"run": {"keep_best": "fid", "patience": 3}},
        subject="run.keep_best",
    ),
    "the best by no such score": Bad(
        r"run.keep_best is mnist.fids, which is no score to choose by: name one of fid, fid_infinite, is_mean, .*",
        {"run": {"keep_best": "mnist.fids"}, "evaluation": {"every": 5}},
        subject="run.keep_best",
    ),
    "the best in a space that is not scored": Bad(
        r"run.keep_best is inception.fid, but evaluation.features \['mnist'\] lacks its space: add it there",
        {"run": {"keep_best": "inception.fid"}, "evaluation": {"every": 5}},
        subject="run.keep_best",
    ),
    "a folder with something else": Bad(
        r".*checked: is not empty and holds no run that can be read: use another run.name",
        {},
        prepare=a_letter,
        subject="run.name",
    ),
    "a run whose environment is damaged": Bad(
        r".*checked: is not empty and holds no run that can be read: use another run.name",
        {},
        prepare=a_run_without_fingerprint,
        subject="run.name",
    ),
    "a folder with another run": Bad(
        r".*: holds a run with other settings \(training.seed is 7 there and 0 here\): give those settings, or .*",
        {},
        prepare=another_run_that_logged,
        subject="run.name",
    ),
    "a finished run whose checkpoints are gone": Bad(
        r".*checked: holds a finished run without its checkpoints/: .* put the checkpoints back, or use another .*",
        {},
        prepare=a_finished_run_without_checkpoints,
        subject="run.name",
    ),
    "a tracker that nobody knows": Bad(
        r"run.trackers holds 'nosuch': choose from .*tensorboard.*",
        {"run": {"trackers": ["nosuch"]}},
        subject="run.trackers",
    ),
    "a tracker whose package is missing": Bad(
        r"run.trackers holds 'dvclive', whose package is missing: pip install dvclive",
        {"run": {"trackers": ["dvclive"]}},
        subject="run.trackers",
    ),
    "options of a tracker that is not there": Bad(
        r"run.tracker_options names wandb, which run.trackers \['tensorboard'\] does not: add it there",
        {"run": {"trackers": ["tensorboard"], "tracker_options": {"wandb": {"entity": "we"}}}},
        subject="run.trackers",
    ),
    "a run on other images": Bad(
        r".*checked: was trained on another version of tiny: use another run.name",
        {},
        prepare=a_run_on_other_images,
        subject="run.name",
    ),
}


def sound(dataset: Path, root: Path) -> Config:
    return Config(
        run=RunConfig(name="checked", root=str(root)),
        data=DataConfig(dataset=str(dataset)),
        evaluation=EvaluationConfig(every=None),
        runtime=RuntimeConfig(device="cpu"),
    )


def stored(dataset: Dataset, folder: Path) -> Path:
    """Its manifest without its shards: enough for all that looks at settings."""
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(to_json(dataset)))
    return folder


@pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE)
def test_the_trainer_raises_what_the_doctor_prints(
    bad: Bad, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dataset = load_dataset(tiny_dataset)
    if bad.dataset is not None:
        dataset = load_dataset(stored(replace(dataset, **bad.dataset), tmp_path / "dataset"))
    config = sound(dataset.folder, tmp_path / "runs")
    sections = {name: replace(getattr(config, name), **values) for name, values in bad.settings.items()}
    config = replace(config, **sections)
    bad.prepare(RunFolder(config.folder), config)
    with pytest.raises(UserError, match=rf"^{bad.message}$") as raised:
        refuse(Plan(config, bad.world_size, dataset))
    ranks = Pretended(world_size=bad.world_size)
    assert f"error    {bad.subject}: {raised.value}" in map(str, examine(config, ranks, False))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_sound_run_is_refused_by_neither(world_size: int, tiny_dataset: Path, tmp_path: Path) -> None:
    config, dataset = sound(tiny_dataset, tmp_path), load_dataset(tiny_dataset)
    for _ in range(2):  # a new one, and one that goes on
        refuse(Plan(config, world_size))
        refuse(Plan(config, world_size, dataset))
        findings = list(examine(config, Pretended(world_size=world_size), False))
        assert {finding.level for finding in findings} == {"ok"}, findings
        if not config.folder.exists():
            saved_run(RunFolder(config.folder), config, dataset.fingerprint)
    assert any(finding.text.endswith("holds this run, which will go on") for finding in findings)
    run = RunFolder(config.folder)
    run.checkpoint(config.training.steps).mkdir(parents=True)
    run.export.parent.mkdir()
    run.export.touch()
    (last,) = (
        finding for finding in examine(config, Pretended(world_size=world_size), False) if finding.subject == "run.name"
    )
    assert last.text.endswith("has its steps already: for more, raise training.steps")


def test_a_run_that_got_nowhere_gives_its_name_back(tiny_dataset: Path, tmp_path: Path) -> None:
    """One that diverged before its first line: the mended settings need not look for another name."""
    config = sound(tiny_dataset, tmp_path)
    another_run(RunFolder(config.folder), config)
    refuse(Plan(config, 1, load_dataset(tiny_dataset)))


def test_what_does_not_need_the_dataset_is_refused_without_it(tiny_dataset: Path, tmp_path: Path) -> None:
    config = sound(tiny_dataset, tmp_path)
    with pytest.raises(UserError, match=r"training\.batch_size 64 cannot be shared among 3"):
        refuse(Plan(config, 3))


def test_a_run_from_before_a_setting_had_its_default(tiny_dataset: Path, tmp_path: Path) -> None:
    config, dataset = sound(tiny_dataset, tmp_path), load_dataset(tiny_dataset)
    folder = RunFolder(config.folder)
    saved_run(folder, config, dataset.fingerprint)
    folder.append_metrics({"step": 1})
    saved = yaml.safe_load(folder.config.read_text())
    for key in ("warm_up", "betas"):
        del saved["training"]["critic_optimizer"][key]
    folder.config.write_text(yaml.safe_dump(saved))
    refuse(Plan(config, 1, dataset))
    warmed = replace(config.training.critic_optimizer, warm_up=9)
    changed = replace(config, training=replace(config.training, critic_optimizer=warmed))
    with pytest.raises(UserError, match=r"training.critic_optimizer.warm_up is 0 there and 9 here"):
        refuse(Plan(changed, 1, dataset))
