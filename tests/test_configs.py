"""Every file of configs/ learns digits: real MNIST, the real trainer, few steps of narrow networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, RuntimeConfig, flatten, make_parser, parse
from pipeline.data import Dataset
from pipeline.runtime import Runtime
from pipeline.trainer import Trainer
from tests.jobs import ROOT, signals_kept

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with signals_kept():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


def read(path: Path, *more: str) -> Config:
    return parse(make_parser("test"), ["--config", str(path), *more])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_fid_halves_between_steps_30_and_300(
    path: Path, runtime: Runtime, mnist_dataset: Dataset, tmp_path: Path
) -> None:
    """At a quarter of the width, which learns at ten times the learning rate (quickstart.yaml is of that kind)."""
    written = flatten(read(path))
    small = ["--network.width", "0.25", "--runtime.device", "cpu", "--runtime.threads", "1", "--run.trackers", "[]"]
    place = ["--run.root", str(tmp_path), "--data.root", str(mnist_dataset.folder.parent)]
    scores = ["--evaluation.num_images", "1000", "--evaluation.every", "300"]
    if written["network.width"] == 1:
        for key in ("training.critic_optimizer.learning_rate", "training.generator_optimizer.learning_rate"):
            small += [f"--{key}", str(10 * written[key])]
    found = {}
    for steps in (30, 300):
        config = read(path, *small, *place, *scores, "--training.steps", str(steps))
        Trainer(config, runtime).run()
        result = json.loads((config.folder / "evaluation" / f"step-{steps:08d}.json").read_text())
        found[steps] = result["features"]["mnist"]
    assert found[300]["fid"] < found[30]["fid"] / 2, {steps: scores["fid"] for steps, scores in found.items()}
    if "class_accuracy" in found[300]:
        assert found[300]["class_accuracy"] > 0.5
