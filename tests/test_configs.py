"""Every file of configs/ learns digits: real MNIST, the real trainer, few steps of narrow networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, RuntimeConfig, flatten, make_parser, parse
from pipeline.data import Dataset
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer
from tests.jobs import ROOT, process_kept

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

FACTORS = {"critic": 10, "generator": 10}
RATE_FACTORS = {
    "quickstart": {"critic": 1, "generator": 1},
    "wgan": {"critic": 10, "generator": 40},
    "wgan_notebook": {"critic": 10, "generator": 200},
}
"""A quarter of the width takes larger steps than the files', and clipped critics are slow to lead: quickstart.yaml is
of that width, and its generator's rate is twenty times its critic's."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with process_kept():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


def read(path: Path, *more: str) -> Config:
    return parse(make_parser("test"), ["--config", str(path), *more])[0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_fid_halves_between_steps_30_and_300(
    path: Path, runtime: Runtime, mnist_dataset: Dataset, tmp_path: Path
) -> None:
    written = flatten(read(path))
    small = ["--network.width", "0.25", "--runtime.device", "cpu", "--runtime.threads", "1", "--run.trackers", "[]"]
    place = ["--run.root", str(tmp_path), "--data.root", str(mnist_dataset.folder.parent)]
    scores = ["--evaluation.num_images", "1000", "--evaluation.every", "300"]
    for role in ("critic", "generator"):
        key = f"training.{role}_optimizer.learning_rate"
        small += [f"--{key}", str(RATE_FACTORS.get(path.stem, FACTORS)[role] * written[key])]
    found = {}
    for steps in (30, 300):
        config = read(path, *small, *place, *scores, "--training.steps", str(steps))
        Trainer(config, runtime).run()
        result = json.loads((config.folder / "evaluation" / f"step-{steps:08d}.json").read_text())
        found[steps] = result["features"]["mnist"]
    assert found[300]["fid"] < found[30]["fid"] / 2, {steps: scores["fid"] for steps, scores in found.items()}
    if "class_accuracy" in found[300]:
        assert found[300]["class_accuracy"] > 0.5
