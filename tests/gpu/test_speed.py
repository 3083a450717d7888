"""How fast a GPU computes: figures for the table of goals. Only what would be a fault fails."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarking.measure import time_in_turn
from pipeline.benchmarking.plain import PlainTrainer
from pipeline.models.networks import Generator
from pipeline.training.trainer import Trainer
from tests.gpu.walks import Bench, take_steps

pytestmark = [pytest.mark.gpu(seconds=60), pytest.mark.filterwarnings("default")]
WARM_UP_STEPS, BLOCK_STEPS, ROUNDS = 3, 20, 5
"""A round is a block of steps, for which the host waits once."""
MATMUL_SIZE = 8192
MATMUL_DTYPES = {"float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Float32 at the others."""
MOST_LAUNCHES = 420
CONVOLUTIONS = re.compile(
    r"conv|[fdw]prop|[dw]grad|winograd|implicit|fft|scudnn|nchw|nhwc|transpose|reduce", re.IGNORECASE
)
"""In the names of cuDNN's kernels, its own reductions and transpositions included, whose number it chooses."""
Record = Callable[[str, object], None]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "float64", "fp16"])
def test_steps(bench: Bench, precision: str, record_property: Record) -> None:
    """Eager and captured steps, the plain port's (float32) and a large matrix product of this precision, in turn."""
    trainers: dict[str, Trainer] = {}
    with ExitStack() as stack:
        # fp16's loss scale is looked at by the host after each update, so it is not captured.
        for mode in ("eager",) if precision == "fp16" else ("eager", "graph"):
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            trainer = stack.enter_context(bench.trainer(precision=precision, cuda_graph=mode == "graph"))
            trainers[mode] = trainer
            take_steps(trainer, WARM_UP_STEPS)
            record_property(f"{mode}_peak_bytes", torch.cuda.max_memory_allocated() - held)
        plain = PlainTrainer(trainers["eager"])
        with FlopCounterMode(display=False) as counter:
            plain.take_step()
        given: dict[str, Any] = {"dtype": MATMUL_DTYPES.get(precision, torch.float32), "device": "cuda"}
        left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, **given) for _ in range(2))
        works: dict[str, Callable[[], object]] = {
            mode: partial(take_steps, each, BLOCK_STEPS) for mode, each in trainers.items()
        }
        works["matmul"] = lambda: torch.mm(left, right)
        if precision == "float32":
            works["plain"] = lambda: [plain.take_step() for _ in range(BLOCK_STEPS)]
        seconds = {name: median(times) for name, times in time_in_turn(works, ROUNDS, trainer.runtime).items()}
        plain.inputs.close()
        finite = all(each.log.losses().isfinite().all() for each in trainers.values())
    ceiling = 2 * MATMUL_SIZE**3 / seconds["matmul"] / 1e12
    steps = {mode: seconds[mode] / BLOCK_STEPS for mode in trainers}
    best = min(steps.values())
    record_property("precision", precision)
    record_property("step_seconds", best)
    record_property("seconds_by_mode", steps)
    record_property("matmul_tflops", ceiling)
    record_property("share_of_matmul", counter.get_total_flops() / 1e12 / best / ceiling)
    if "plain" in seconds:
        record_property("plain_seconds", seconds["plain"] / BLOCK_STEPS)
    assert finite


def test_a_captured_step_is_few_launches(bench: Bench, record_property: Record) -> None:
    """One captured step under the profiler: what the device is given, and how long it works on what."""
    with bench.trainer(cuda_graph=True) as trainer:
        take_steps(trainer, WARM_UP_STEPS)
        inputs = trainer.inputs.take()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            trainer.step(inputs)
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    seconds: dict[str, float] = {}
    for event in events:
        seconds[event.name] = seconds.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    others = [event for event in events if not CONVOLUTIONS.search(event.name)]
    record_property("launches", len(events))
    record_property("launches outside convolutions", len(others))
    record_property("kernel_seconds", dict(sorted(seconds.items(), key=lambda item: -item[1])[:20]))
    assert 0 < len(others) <= MOST_LAUNCHES


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_memory_layouts(bench: Bench, precision: str, record_property: Record) -> None:
    """Captured steps with each memory layout, cuDNN with and without benchmark and deterministic, in turn."""
    works = {}
    with ExitStack() as stack:
        for layout, benchmark, deterministic in itertools.product(
            ("channels-last", "contiguous"), (False, True), (True, False)
        ):
            trainer = stack.enter_context(bench.trainer(precision=precision, cuda_graph=True))
            if layout == "contiguous":
                _make_contiguous(trainer)
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
            take_steps(trainer, WARM_UP_STEPS)  # captured with these settings, whatever they are later
            words = [layout, "benchmark" if benchmark else "", "deterministic" if deterministic else ""]
            works[", ".join(filter(None, words))] = partial(take_steps, trainer, BLOCK_STEPS)
        seconds = time_in_turn(works, ROUNDS, trainer.runtime)
    for name, times in seconds.items():
        record_property(f"{name}, s a step", median(times) / BLOCK_STEPS)


def _make_contiguous(trainer: Trainer) -> None:
    """Puts torch's default memory layout in the place of channels-last, from the generator's first maps on."""
    state = trainer.state
    for network in (state.generator, state.critic, state.ema):
        network.to(memory_format=torch.contiguous_format)
    assert isinstance(state.generator, Generator)
    first_maps = state.generator.first_maps
    state.generator.first_maps = lambda *given: first_maps(*given).contiguous()  # type: ignore[method-assign]
