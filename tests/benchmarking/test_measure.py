"""The figures of the benchmark."""

from __future__ import annotations

import json
import math
import resource
import tarfile
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from pipeline.benchmarking import measure
from pipeline.config import Config, NetworkConfig, TrainingConfig
from pipeline.data import Dataset
from pipeline.data.prepare import index_shards
from pipeline.distributed.process import Runtime
from pipeline.errors import TrainingFailed
from pipeline.training.trainer import Trainer
from tests.jobs import ROOT, launch

SMALL = [
    *("--network.width", "0.25", "--training.n_critic", "1", "--evaluation.num_images", "501"),
    *("--training.burn_in_n_critic", "7"),  # no part of what is measured
    *("--training.generator_optimizer.learning_rate", "1e-3", "--runtime.device", "cpu", "--runtime.threads", "1"),
]

# Of SMALL: generator and critic forward by their layers, 2 for each weight and each of the 25 taps of a place.
GENERATOR = 2 * (100 * 49 * 32 + 25 * (32 * 32 * 49 + 32 * 16 * 196 + 16 * 8 * 784 + 8 * 784))
CRITIC = 2 * (25 * (8 * 196 + 8 * 16 * 49 + 16 * 32 * 16 + 32 * 64 * 16) + 1024)
# A backward pass is twice a forward pass; nobody wants gradients by latents, or in the critic's update by images.
GFLOP = 64 * (4 * GENERATOR + 9 * CRITIC - 2 * (100 * 49 * 32 + 2 * 25 * 8 * 196)) / 1e9


def test_works_are_timed_in_turn_and_the_warm_up_does_not_count(runtime: Runtime) -> None:
    done: list[str] = []
    works = {name: partial(done.append, name) for name in ("one", "other")}
    seconds = measure.time_in_turn(works, 2, runtime, warm_up=3)
    assert done == ["one", "other"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"one": 2, "other": 2}


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert measure.ratio([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == 2


@pytest.mark.parametrize(
    ("width", "last_forms"),
    [
        (0.05, {"generator.2": "pairs", "generator.3": "pairs", "critic.3": "pairs"}),
        (0.8, {"generator.3": "taps", "critic.3": "products"}),
    ],
)
def test_every_form_in_use_is_in_the_table(
    width: float, last_forms: dict[str, str], config: Config, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "KERNEL_ROUNDS", 2)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    small = TrainingConfig(batch_size=8, n_critic=1)
    trainer = Trainer(replace(config, network=NetworkConfig(width=width), training=small), runtime)
    table = measure.measure_kernels(trainer)
    transposed = dict.fromkeys(("generator.0", "generator.1"), "convolution")
    found = {row["layer"].replace(".convolutions", ""): row["form"].split("_")[-1] for row in table}
    assert found == transposed | last_forms
    assert trainer.state.step == 1
    assert not any(layer._forward_pre_hooks for layer in trainer.state.generator.modules())


@pytest.mark.slow
def test_the_neighbour_is_there_in_every_second_round_and_gone_afterwards(
    config: Config, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def take_step(trainer: Trainer) -> None:
        trainer.take_step()
        seen.append(sum("getppid" in "".join(child.cmdline()) for child in psutil.Process().children()))

    monkeypatch.setattr(measure, "_take_step", take_step)
    monkeypatch.setattr(measure, "SETTLING_SECONDS", 0.5)
    monkeypatch.setattr(measure, "NEIGHBOUR_SECONDS", 0.5)
    assert measure.measure_neighbour(Trainer(config, runtime)) > 0
    changes = [after for before, after in pairwise(seen) if before != after]
    assert changes == ([0] if seen[0] else [1, 0]) + [1, 0] * (measure.NEIGHBOUR_ROUNDS - 1)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves its file to be closed
def test_shards_of_single_images_are_timed_too(tmp_path: Path, runtime: Runtime) -> None:
    with tarfile.open(tmp_path / "colour.tar", "w") as archive:
        for number in range(8):
            Image.new("RGB", (8, 8), (number, 0, 9)).save(tmp_path / "one.png")
            archive.add(tmp_path / "one.png", f"{number}.png")
    dataset = index_shards(tmp_path, "colour", {"train": [str(tmp_path / "colour.tar")]})
    config = Config(training=TrainingConfig(batch_size=8))
    figures = measure.measure_data(config, runtime, dataset)
    assert len(figures) == 5
    assert min(figures.values()) > 0


def test_a_benchmark_whose_saves_fail_fails(
    config: Config, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "MATMUL_SIZE", 8)
    monkeypatch.setattr(measure, "measure_neighbour", lambda trainer: 1.0)  # takes seconds
    monkeypatch.setattr(measure, "KERNEL_ROUNDS", 2)
    config = replace(config, training=TrainingConfig(batch_size=8, n_critic=1))
    figures = measure.measure_training(config, runtime, 10)
    assert figures["checkpoint_stall_share"] > 0
    assert capsys.readouterr().err == "step 13: saved\n"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))  # a longer file, as a checkpoint is, cannot be written
    try:
        with pytest.raises(TrainingFailed, match=r"checkpoints can't be written: .*File too large"):
            measure.measure_training(config, runtime, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_benchmark_measures_what_it_says(world_size: int, scored_digits: Dataset, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    settings = ["--steps", "10", "--json", str(figures), "--data.dataset", str(scored_digits.folder)]
    result = launch(ROOT / "tests/benchmarking/brief_benchmark.py", [*SMALL, *settings], world_size)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "failed" not in result.stderr
    found = json.loads(figures.read_text())
    assert found == json.loads(result.stdout), "what is printed"
    kernels, devices = found.pop("kernels"), found.pop("devices")
    assert devices == {"core": world_size * found["threads_per_rank"]}
    zero = {"all_reduce_share"} if world_size == 1 else set()
    numbers = {name: value for name, value in found.items() if not isinstance(value, str) and name not in zero}
    assert all(math.isfinite(value) and value > 0 for value in numbers.values()), found
    compared = (
        {"scoring_speedup_over_torch_fidelity"} if world_size == 1 else {"all_reduce_share", "speed_over_one_rank"}
    )
    for key in {"share_of_ceiling", "speedup_over_eager"} | compared:
        assert 0 < found[key] < 100, key
    assert found["achieved_gflops"] == pytest.approx(found["gflop_per_step"] / found["step_seconds_median"])
    assert found["share_of_ceiling"] == pytest.approx(found["achieved_gflops"] / found["ceiling_gflops"])
    assert found["world_size"] == world_size
    assert found["gflop_per_step"] == pytest.approx(GFLOP, rel=1e-3)
    assert found["images_per_second"] == pytest.approx(64 / found["step_seconds_median"])
    assert found["data_wait_share"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert [row["layer"] for row in kernels] == [f"generator.convolutions.{index}" for index in range(4)]
    assert [row["form"] for row in kernels] == ["transposed_convolution"] * 2 + ["convolution_on_pairs"] * 2
    assert all(
        0 < row["seconds"] < 60 and 0 < row["stock_seconds"] < 60 and 0 < row["speedup"] < 100 for row in kernels
    )
