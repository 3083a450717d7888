"""Contracts 1 to 3: one trajectory for any number of ranks, exact resume, elastic resume. Real processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import Config, RuntimeConfig
from pipeline.data.prepare import ShardSizes, prepare_npz
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.export.generator_file import load_generator
from pipeline.export.images import render_range
from pipeline.models.networks import AnyGenerator, Generator
from pipeline.models.objectives import OBJECTIVES
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer
from tests.distributed.runs import (
    ELASTIC,
    ON_FOUR_RANKS,
    RECIPES,
    SOURCES,
    STEPS,
    STOPS,
    VARIANTS,
    Trained,
    losses,
)
from tests.jobs import (
    ROOT,
    changed,
    environment,
    final_state,
    flags,
    launch,
    restoring_process,
    tiny_config,
)

HINGE = """
from torch.nn import functional as F
from pipeline.models.objectives import Objective
hinge = Objective(lambda s: F.relu(1 - s).mean(), lambda s: F.relu(1 + s).mean(), lambda s: -s.mean())
number = 3
"""

TRAIN = ROOT / "pipeline/train.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("large")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    np.savez(root / "large.npz", images=pixels)
    large = prepare_npz(root, "large", {"train": root / "large.npz"}, ShardSizes(10, 20)).folder
    return Trained({"tiny": tiny_dataset, "large": large}, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def base(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run outside of the table."""
    return tiny_config(
        run={"root": str(tmp_path_factory.mktemp("single") / "runs")},
        data={"dataset": str(tiny_dataset)},
        training={"steps": STEPS},
    )


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    largest = {name: (tensor - right[name]).abs().max().item() for name, tensor in left.items()}
    assert max(largest.values()) <= tolerance, max(largest.items(), key=lambda item: item[1])


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different


def test_every_objective_is_covered() -> None:
    assert set(OBJECTIVES) <= set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "world_size"), [*((name, 2) for name in (*VARIANTS, *SOURCES)), *((name, 4) for name in ON_FOUR_RANKS)]
)
def test_the_trajectory_does_not_depend_on_the_world_size(trained: Trained, name: str, world_size: int) -> None:
    assert_close(trained.weights(f"{name}-1"), trained.weights(f"{name}-{world_size}"), 1e-9)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_trajectory_does_not_depend_on_the_parts_of_a_batch(trained: Trained, name: str, world_size: int) -> None:
    """Batch norm included, whose statistics are those of the whole batch."""
    whole, parts = trained.weights(f"{name}-1"), trained.weights(f"{name}-parts-{world_size}")
    assert_close(whole, parts, 1e-9)
    assert any(not torch.equal(tensor, parts[key]) for key, tensor in whole.items()), "it did run in parts"


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("name", "compared"), [("wgan", [0]), ("lsgan", [0, 1])])
def test_in_float32_the_losses_agree(trained: Trained, name: str, compared: list[int], world_size: int) -> None:
    """WGAN's critic loss does not change when all scores shift together. In that flat direction (the last convolution's
    biases) the gradient is rounding error, which RMSprop enlarges to steps of ordinary size, and the generator's loss
    shifts along: it is compared for an objective that fixes the scores' origin."""
    one, many = (trained.losses(f"{name}-float32-{ranks}")[:, compared] for ranks in (1, world_size))
    assert ((one - many).abs() / one.abs().amax(dim=0)).max() < 1e-3


def test_the_sources_and_variants_are_different_runs(trained: Trained) -> None:
    """The comparisons above would pass for runs that ignore their settings."""
    weights = {name: trained.weights(f"{name}-1")["generator.dense.weight"] for name in (*VARIANTS, "streaming")}
    names = [name for name in weights if name not in ("acgan", "gan")]
    for i, name in enumerate(names):
        assert all(not torch.equal(weights[name], weights[other]) for other in names[:i]), name


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """One process, in this one."""
    with restoring_process():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, STEPS - 1), source=st.sampled_from(sorted(SOURCES)), cadence=st.integers(1, STEPS))
def test_a_run_may_stop_after_any_step(stop: int, source: str, cadence: int, base: Config, runtime: Runtime) -> None:
    """Bit for bit, whatever the step and wherever the checkpoints fall; stopped runs end with a checkpoint."""

    def train(name: str, steps: int, every: int = 1000) -> dict[str, torch.Tensor]:
        config = changed(base, **SOURCES[source])
        config = changed(config, run={"name": name, "checkpoint_every": every}, training={"steps": steps})
        if not RunFolder(config.folder).checkpoint(steps).exists():
            Trainer(config, runtime).run()
        return final_state(config.folder, steps)

    whole = train(f"any-whole-{source}", STEPS)
    train(f"any-{source}-{stop}-{cadence}", stop, cadence)
    assert_equal(whole, train(f"any-{source}-{stop}-{cadence}", STEPS, cadence))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained: Trained, world_size: int) -> None:
    """Stopped at several steps of both sources, mid-epoch and right after a checkpoint or evaluation alike."""
    for source in SOURCES:
        for stop in STOPS:
            resumed = trained.weights(f"resumed-{source}-{world_size}-{stop}")
            assert_equal(trained.weights(f"whole-{source}-{world_size}"), resumed)


@pytest.mark.parametrize("name", RECIPES)
def test_a_resume_forgets_no_part_of_a_recipe(trained: Trained, name: str) -> None:
    assert_equal(trained.weights(f"whole-{name}"), trained.weights(f"resumed-{name}"))


@pytest.mark.parametrize(("before", "after"), ELASTIC)
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_goes_on_with_another_number_of_ranks(trained: Trained, before: int, after: int, source: str) -> None:
    name = f"elastic-{source}-{before}-{after}"
    for step, ranks in ((9, before), (STEPS, after)):
        assert trained.checkpoint(name, step).world_size == ranks
    assert_close(trained.weights(f"{source}-1"), trained.weights(name), 1e-9)


def test_data_workers_change_no_batch_of_a_run(trained: Trained) -> None:
    """Nor does a resume with another number of ranks, where they begin in the middle of a shard."""
    assert_close(trained.weights("streaming-1"), trained.weights("workers"), 1e-9)


def test_a_run_goes_on_with_three_ranks(trained: Trained) -> None:
    assert_close(trained.weights("whole-48"), trained.weights("three"), 1e-9)


@pytest.mark.parametrize("name", ["guide", "large"])
def test_other_networks_walk_one_trajectory_resume_and_are_exported(trained: Trained, name: str) -> None:
    assert_close(trained.weights(f"{name}-1"), trained.weights(f"{name}-2"), 1e-9)
    assert_equal(trained.weights(f"{name}-2"), trained.weights(f"{name}-resumed-2"))
    path = RunFolder(trained.root / f"{name}-2").export
    exported = load_generator(path, code="tests.guide:Generator" if name == "guide" else None)
    average = {key: value for key, value in trained.weights(f"{name}-2").items() if key.startswith("ema.")}
    assert_equal({f"ema.{key}": value for key, value in exported.state_dict().items()}, average)
    images = render_range(exported, 0, 0, 3)
    assert images.shape == ((3, 1, 8, 8) if name == "guide" else (3, 3, 64, 64))
    assert images.min() < images.max()


def test_a_network_of_ones_own_is_scored_and_its_files_name_it(trained: Trained) -> None:
    one, two = (json.loads(RunFolder(trained.root / f"guide-{w}").scores(STEPS).read_text()) for w in (1, 2))
    fids = [scores["features"]["torch.nn:Flatten"]["fid"] for scores in (one, two)]
    assert fids[0] == pytest.approx(fids[1], rel=1e-6)
    assert 0 < fids[0] < math.inf
    path = RunFolder(trained.root / "guide-2").export
    named = r"--network.generator tests.guide:Generator \(in Python: code='tests.guide:Generator'\)$"
    with pytest.raises(UserError, match=rf"^{path}: .* name it with {named}"):
        load_generator(path)
    with pytest.raises(UserError, match=rf"step-00000014: .* {named}"):
        load_generator(trained.root / "guide-2", "ema")


def test_replicas_hold_the_clip_and_share_the_work(trained: Trained) -> None:
    checkpoint = trained.checkpoint("wgan-4", STEPS)
    critic = {name: value for name, value in checkpoint.tensors().items() if name.startswith("critic.")}
    assert max(value.abs().max().item() for value in critic.values()) == 0.01
    assert len(checkpoint.files) == 4, "every rank writes a shard"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["lsgan"])
def test_bf16_stays_near_float32_and_resumes_bit_for_bit(trained: Trained, name: str, world_size: int) -> None:
    whole, resumed, parts = (f"{name}-bf16-{kind}-{world_size}" for kind in ("whole", "resumed", "parts"))
    assert_equal(trained.weights(whole), trained.weights(resumed))
    exact, near, in_parts = (trained.losses(run) for run in (f"{name}-float32-{world_size}", whole, parts))
    scale = exact.abs().amax(dim=0)
    assert 1e-5 < ((near - exact).abs() / scale).max() < 0.05
    assert ((in_parts - exact).abs() / scale).max() < 0.05
    assert {tensor.dtype for tensor in trained.weights(whole).values()} <= {torch.float32, torch.int64}


def test_fp16_needs_a_gpu(base: Config) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = launch(TRAIN, flags(changed(base, runtime={"precision": "fp16"})))
    assert "error: runtime.precision is fp16, which takes a CUDA device: use bf16 or float32" in result.stderr


def test_an_objective_of_the_users_own(base: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HINGE)
    config = changed(base, run={"name": "hinge"}, training={"objective": "mine:hinge", "clip_value": None})
    result = launch(TRAIN, flags(config), folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(config.folder)[0, 0] == pytest.approx(1, abs=0.2), "(1 - s + 1 + s) / 2 at small scores"


def test_a_run_that_began_before_its_networks_grew_is_told(
    base: Config, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All doubled twice once, whatever the size, and their checkpoints say so by saying nothing."""
    config = changed(base, run={"name": "grown"}, training={"steps": 1})
    Trainer(config, runtime).run()
    monkeypatch.setattr(Generator, "spec", lambda self: AnyGenerator.spec(self) | {"doublings": 4})
    with pytest.raises(UserError, match=r"step-00000001: its networks double less often .* another run.name"):
        Trainer(changed(config, training={"steps": 2}), runtime).run()


def test_parts_that_do_not_divide_a_ranks_share_are_refused(base: Config) -> None:
    result = launch(TRAIN, flags(changed(base, run={"name": "odd-parts"}, runtime={"accumulation": 3})), 2)
    assert (
        "error: runtime.accumulation is 3: it does not divide the 32 images that a rank takes of training.batch_size 64"
    ) in result.stderr


def test_a_batch_that_the_ranks_cannot_share_is_refused(base: Config, tmp_path: Path) -> None:
    odd = changed(base, run={"root": str(tmp_path / "runs")}, training={"batch_size": 63})
    result = launch(TRAIN, flags(odd), 2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: training.batch_size 63 cannot be shared among 2 processes: "
        "choose a batch size that the number of processes divides"
    ]
    assert not (tmp_path / "runs").exists()


def test_the_launchers_silent_trap_is_refused(base: Config, tmp_path: Path) -> None:
    """`--cpu --num_processes 2` starts one process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, str(TRAIN), *flags(changed(base, run={"root": str(tmp_path / "runs")}))]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "error: the launcher was asked for num_processes 2 but started 1: " in result.stderr
    assert not (tmp_path / "runs").exists()
