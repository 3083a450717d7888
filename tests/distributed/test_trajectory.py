"""Contracts 1 to 3: one trajectory for any number of ranks, exact resume, elastic resume. Real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import RuntimeConfig, make_parser, parse
from pipeline.distributed.process import Runtime
from pipeline.models.objectives import OBJECTIVES
from pipeline.storage.checkpoint import committed, find, read_checkpoint
from pipeline.training.trainer import Trainer
from tests.jobs import ROOT, TINY, environment, launch, process_kept, train_many

STEPS = 20
SETTINGS = {
    "wgan": [],
    "wgan_gp": ["--training.gradient_penalty", "10", "--training.clip_value", "null"],
    "lsgan": ["--training.clip_value", "null"],
    "gan": ["--training.clip_value", "null"],
    "acgan": ["--training.clip_value", "null"],
}
VARIANTS = {
    **{name: ["--training.objective", name, *settings] for name, settings in SETTINGS.items()},
    "separate": ["--training.critic_updates", "separate", "--training.critic_fakes", "moving"],
    "adam": ["--training.critic_optimizer.algorithm", "adam", "--training.generator_optimizer.algorithm", "adam"],
}
SOURCES = {
    "resident": ["--data.source", "resident"],
    "streaming": ["--data.source", "streaming", "--data.lanes", "8", "--data.workers", "1"],
}


PARTS = ["--runtime.accumulation", "4"]
HINGE = """
from torch.nn import functional as F
from pipeline.models.objectives import Objective
hinge = Objective(lambda s: F.relu(1 - s).mean(), lambda s: F.relu(1 + s).mean(), lambda s: -s.mean())
number = 3
"""

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def arguments(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """(run's name, further arguments) -> the arguments of a run in a folder that all tests of this file share."""
    root = tmp_path_factory.mktemp("runs")

    def build(name: str, *more: str, steps: int = STEPS) -> list[str]:
        fixed = ["--run.name", name, "--run.root", str(root), "--training.steps", str(steps)]
        return [*TINY, "--data.dataset", str(tiny_dataset), *fixed, *more]

    build.root = root  # type: ignore[attr-defined]
    return build


def final(arguments: Arguments, name: str) -> dict[str, torch.Tensor]:
    return find(arguments.root / name, STEPS).tensors()  # type: ignore[attr-defined]


def losses(arguments: Arguments, name: str) -> torch.Tensor:
    lines = (arguments.root / name / "metrics.jsonl").read_text().splitlines()  # type: ignore[attr-defined]
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return torch.tensor([[row["critic_loss"], row["generator_loss"]] for row in rows])


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    largest = {name: (tensor - right[name]).abs().max().item() for name, tensor in left.items()}
    assert max(largest.values()) <= tolerance, max(largest.items(), key=lambda item: item[1])


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different


@pytest.fixture(scope="session")
def trajectories(arguments: Arguments) -> Arguments:
    """Every variant, uninterrupted, at 1, 2 and 4 ranks, in float64; WGAN also in float32."""
    for world_size in (1, 2, 4):
        runs = [
            arguments(f"{name}-{world_size}", *variant, "--runtime.precision", "float64")
            for name, variant in (VARIANTS | SOURCES).items()
        ]
        if world_size < 4:
            runs += [
                arguments(f"{name}-parts-{world_size}", *variant, "--runtime.precision", "float64", *PARTS)
                for name, variant in VARIANTS.items()
            ]
        # A wide clip keeps this small critic's scores well above their rounding error.
        runs.append(arguments(f"wgan-float32-{world_size}", "--training.clip_value", "0.3"))
        runs.append(arguments(f"lsgan-float32-{world_size}", *VARIANTS["lsgan"]))
        train_many(runs, world_size)
    return arguments


def test_every_objective_is_covered() -> None:
    assert set(OBJECTIVES) <= set(VARIANTS)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", [*VARIANTS, *SOURCES])
def test_the_trajectory_does_not_depend_on_the_world_size(trajectories: Arguments, name: str, world_size: int) -> None:
    assert_close(final(trajectories, f"{name}-1"), final(trajectories, f"{name}-{world_size}"), 1e-9)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_trajectory_does_not_depend_on_the_parts_of_a_batch(
    trajectories: Arguments, name: str, world_size: int
) -> None:
    """Batch norm included, whose statistics are those of the whole batch."""
    whole, parts = final(trajectories, f"{name}-1"), final(trajectories, f"{name}-parts-{world_size}")
    assert_close(whole, parts, 1e-9)
    assert any(not torch.equal(tensor, parts[key]) for key, tensor in whole.items()), "it did run in parts"


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("name", "compared"), [("wgan", [0]), ("lsgan", [0, 1])])
def test_in_float32_the_losses_agree(trajectories: Arguments, name: str, compared: list[int], world_size: int) -> None:
    """WGAN's critic loss does not change when all scores shift together. In that flat direction (the last convolution's
    biases) the gradient is rounding error, which RMSprop enlarges to steps of ordinary size, and the generator's loss
    shifts along: it is compared for an objective that fixes the scores' origin."""
    one, many = (losses(trajectories, f"{name}-float32-{ranks}")[:, compared] for ranks in (1, world_size))
    assert ((one - many).abs() / one.abs().amax(dim=0)).max() < 1e-3


def test_the_sources_and_variants_are_different_runs(trajectories: Arguments) -> None:
    """The comparisons above would pass for runs that ignore their settings."""
    weights = {name: final(trajectories, f"{name}-1")["critic.score.weight"] for name in (*VARIANTS, "streaming")}
    names = [name for name in weights if name not in ("acgan", "gan")]
    for i, name in enumerate(names):
        assert all(not torch.equal(weights[name], weights[other]) for other in names[:i]), name


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """One process, in this one."""
    with process_kept():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, STEPS - 1), source=st.sampled_from(sorted(SOURCES)), cadence=st.integers(1, STEPS))
def test_a_run_may_stop_after_any_step(
    stop: int, source: str, cadence: int, arguments: Arguments, runtime: Runtime
) -> None:
    """Bit for bit, whatever the step and wherever the checkpoints fall; stopped runs end with a checkpoint."""

    def train(name: str, steps: int, *more: str) -> None:
        if not (arguments.root / name / "checkpoints" / f"step-{steps:08d}").exists():  # type: ignore[attr-defined]
            config, _ = parse(make_parser("test"), arguments(name, *SOURCES[source], *more, steps=steps))
            Trainer(config, runtime).run()

    whole, stopped = f"any-whole-{source}", f"any-{source}-{stop}-{cadence}"
    train(whole, STEPS)
    train(stopped, stop, "--run.checkpoint_every", str(cadence))
    train(stopped, STEPS, "--run.checkpoint_every", str(cadence))
    assert_equal(final(arguments, whole), final(arguments, stopped))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(arguments: Arguments, world_size: int) -> None:
    """Stopped at several steps of both sources, mid-epoch and right after a checkpoint or evaluation alike."""
    cadence = ["--run.checkpoint_every", "4"]
    runs = []
    for source, chosen in SOURCES.items():
        whole = f"whole-{source}-{world_size}"
        runs.append(arguments(whole, *chosen, *cadence))
        for stop in (1, 7, 12):
            name = f"resumed-{source}-{world_size}-{stop}"
            runs += [arguments(name, *chosen, *cadence, steps=stop), arguments(name, *chosen, *cadence)]
    train_many(runs, world_size)
    for source in SOURCES:
        for stop in (1, 7, 12):
            resumed = final(arguments, f"resumed-{source}-{world_size}-{stop}")
            assert_equal(final(arguments, f"whole-{source}-{world_size}"), resumed)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_goes_on_with_another_number_of_ranks(
    trajectories: Arguments, before: int, after: int, source: str
) -> None:
    name = f"elastic-{source}-{before}-{after}"
    chosen = [*SOURCES[source], "--runtime.precision", "float64"]
    train_many([trajectories(name, *chosen, steps=9)], before)
    assert read_checkpoint(committed(trajectories.root / name / "checkpoints")[-1]).world_size == before  # type: ignore[attr-defined]
    train_many([trajectories(name, *chosen)], after)
    assert_close(final(trajectories, f"{source}-1"), final(trajectories, name), 1e-9)


def test_a_run_goes_on_with_three_ranks(arguments: Arguments) -> None:
    chosen = ["--training.batch_size", "48", "--runtime.precision", "float64"]
    train_many([arguments("whole-48", *chosen), arguments("three", *chosen, steps=9)], 4)
    train_many([arguments("three", *chosen)], 3)
    assert_close(final(arguments, "whole-48"), final(arguments, "three"), 1e-9)


def test_replicas_hold_the_clip_and_share_the_work(trajectories: Arguments) -> None:
    checkpoint = find(trajectories.root / "wgan-4", STEPS)  # type: ignore[attr-defined]
    critic = {name: value for name, value in checkpoint.tensors().items() if name.startswith("critic.")}
    assert max(value.abs().max().item() for value in critic.values()) == 0.01
    assert len(checkpoint.files) == 4, "every rank writes a shard"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["lsgan"])
def test_bf16_stays_near_float32_and_resumes_bit_for_bit(arguments: Arguments, name: str, world_size: int) -> None:
    chosen = [*VARIANTS[name], "--runtime.precision", "bf16"]
    whole, resumed, parts = (f"{name}-bf16-{kind}-{world_size}" for kind in ("whole", "resumed", "parts"))
    train_many(
        [
            arguments(whole, *chosen),
            arguments(resumed, *chosen, steps=7),
            arguments(resumed, *chosen),
            arguments(parts, *chosen, *PARTS),
        ],
        world_size,
    )
    train_many(
        [arguments(f"{name}-float32", *VARIANTS[name], "--run.name", f"{name}-float32-{world_size}")], world_size
    )
    assert_equal(final(arguments, whole), final(arguments, resumed))
    exact, near, in_parts = (losses(arguments, run) for run in (f"{name}-float32-{world_size}", whole, parts))
    scale = exact.abs().amax(dim=0)
    assert 1e-5 < ((near - exact).abs() / scale).max() < 0.05
    assert ((in_parts - exact).abs() / scale).max() < 0.05
    assert {tensor.dtype for tensor in final(arguments, whole).values()} <= {torch.float32, torch.int64}


def test_compressed_gradients_are_those_of_every_rank_to_three_digits(arguments: Arguments) -> None:
    plain, compressed = arguments("plain", *VARIANTS["gan"]), arguments("compressed", *VARIANTS["gan"])
    train_many([plain], 2)
    train_many([[*compressed, "--runtime.compress_gradients", "true"]], 2)
    ours, theirs = losses(arguments, "plain"), losses(arguments, "compressed")
    assert 1e-7 < ((ours - theirs).abs() / ours.abs()).max() < 1e-2


def test_fp16_needs_a_gpu(arguments: Arguments) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = launch(ROOT / "pipeline/train.py", arguments("fp16", "--runtime.precision", "fp16"))
    assert "error: runtime.precision is fp16, which takes a CUDA device: use bf16 or float32" in result.stderr


def test_an_objective_of_the_users_own(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HINGE)
    own = ["--training.objective", "mine:hinge", "--training.clip_value", "null"]
    result = launch(ROOT / "pipeline/train.py", arguments("hinge", *own), folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    first = losses(arguments, "hinge")[0]
    assert first[0] == pytest.approx(1, abs=0.2), "(1 - s + 1 + s) / 2 at small scores"


def test_parts_that_do_not_divide_a_ranks_share_are_refused(arguments: Arguments) -> None:
    result = launch(ROOT / "pipeline/train.py", arguments("odd-parts", "--runtime.accumulation", "3"), 2)
    assert (
        "error: runtime.accumulation is 3: it does not divide the 32 images that a rank takes of training.batch_size 64"
    ) in result.stderr


def test_a_batch_that_the_ranks_cannot_share_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    odd = arguments("odd", "--training.batch_size", "63", "--run.root", str(tmp_path / "runs"))
    result = launch(ROOT / "pipeline/train.py", odd, 2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: training.batch_size 63 cannot be shared among 2 processes: "
        "choose a batch size that the number of processes divides"
    ]
    assert not (tmp_path / "runs").exists()


def test_the_launchers_silent_trap_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    """`--cpu --num_processes 2` starts one process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, str(ROOT / "pipeline/train.py"), *arguments("trap"), "--run.root", str(tmp_path / "runs")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "told --num_processes 2 but started 1: add --multi_gpu" in result.stderr
    assert not (tmp_path / "runs").exists()
