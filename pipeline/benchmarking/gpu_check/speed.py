"""Checks of how fast a GPU computes, and that nobody keeps it waiting."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarking.gpu_check.context import Context, take_steps
from pipeline.benchmarking.gpu_check.table import REFERENCE_STEPS, Rows, row
from pipeline.benchmarking.measure import time_in_turn
from pipeline.benchmarking.plain import PlainTrainer
from pipeline.models.networks import Generator
from pipeline.training.trainer import Trainer

WARM_UP_STEPS, BLOCK_STEPS, ROUNDS = 3, 20, 5
"""A round is a block of steps, for which the host waits once."""
MATMUL_SIZE = 8192
MATMUL_DTYPES = {"float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Float32 at the others."""
LAYOUT_TOLERANCE = 1.1
MOST_LAUNCHES = 420
CONVOLUTIONS = re.compile(r"conv|[fdw]prop|[dw]grad|winograd|implicit|fft|scudnn", re.IGNORECASE)
"""In the names of cuDNN's kernels."""
MIB = 2**20


def speed(context: Context, precision: str) -> Rows:
    """Eager and captured steps, the plain port's (float32) and a large matrix product of this precision, in turn."""
    trainers: dict[str, Trainer] = {}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        # fp16's loss scale is looked at by the host after each update, so it is not captured.
        for mode in ("eager",) if precision == "fp16" else ("eager", "graph"):
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            made = context.trainer(precision=precision, cuda_graph=mode == "graph")
            trainers[mode] = stack.enter_context(made)
            take_steps(trainers[mode], WARM_UP_STEPS)
            peaks[mode] = torch.cuda.max_memory_allocated() - held
        trainer = trainers["eager"]
        plain = PlainTrainer(trainer)
        with FlopCounterMode(display=False) as counter:
            plain.take_step()
        given: dict[str, Any] = {"dtype": MATMUL_DTYPES.get(precision, torch.float32), "device": trainer.runtime.device}
        left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, **given) for _ in range(2))
        works: dict[str, Callable[[], object]] = {
            mode: partial(take_steps, each, BLOCK_STEPS) for mode, each in trainers.items()
        }
        works["matmul"] = lambda: torch.mm(left, right)
        if precision == "float32":
            works["plain"] = lambda: [plain.take_step() for _ in range(BLOCK_STEPS)]
        found = time_in_turn(works, ROUNDS, trainer.runtime)
        plain.inputs.close()
        finite = {mode: bool(each.log.losses().isfinite().all()) for mode, each in trainers.items()}
    ceiling = 2 * MATMUL_SIZE**3 / median(found["matmul"]) / 1e12
    gflop = counter.get_total_flops() / 1e9
    more = {"plain_seconds": median(found["plain"]) / BLOCK_STEPS} if "plain" in found else {}
    eager_seconds = median(found["eager"]) / BLOCK_STEPS
    for mode in trainers:
        seconds = median(found[mode]) / BLOCK_STEPS
        share = gflop / 1e3 / seconds / ceiling
        seen = f"{seconds * 1e3:.2f} ms a step, {REFERENCE_STEPS * seconds:.0f} s for {REFERENCE_STEPS:,}, "
        seen += f"peak {peaks[mode] / MIB:.0f} MiB, {share:.0%} of a matmul's {ceiling:.1f} TFLOP/s"
        expected = "finite losses" + ("" if mode == "eager" else ", no slower than eager")
        numbers = {"precision": precision, "mode": mode, "step_seconds": seconds, "peak_bytes": peaks[mode]}
        numbers |= {"share_of_ceiling": share, "matmul_tflops": ceiling, "gflop_per_step": gflop, **more}
        yield row(f"speed, {precision}, {mode}", expected, seen, finite[mode] and seconds <= eager_seconds, **numbers)


def layouts(context: Context, precision: str) -> Rows:
    """Captured steps with each memory layout, cuDNN with and without benchmark and deterministic, in turn."""
    works = {}
    with ExitStack() as stack:
        for layout, benchmark, deterministic in itertools.product(
            ("channels-last", "contiguous"), (False, True), (True, False)
        ):
            trainer = stack.enter_context(context.trainer(precision=precision, cuda_graph=True))
            if layout == "contiguous":
                _make_contiguous(trainer)
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
            take_steps(trainer, WARM_UP_STEPS)  # captured with these settings, whatever they are later
            words = [layout, "benchmark" if benchmark else "", "deterministic" if deterministic else ""]
            works[", ".join(filter(None, words))] = partial(take_steps, trainer, BLOCK_STEPS)
        found = time_in_turn(works, ROUNDS, trainer.runtime)
    seconds = {name: median(each) / BLOCK_STEPS for name, each in found.items()}
    default, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    seen = f"{default}: {seconds[default] * 1e3:.2f} ms; {best}: {seconds[best] * 1e3:.2f} ms"
    holds = seconds[default] <= LAYOUT_TOLERANCE * seconds[best]
    expected = f"the default at most {LAYOUT_TOLERANCE} times the fastest's time"
    yield row(f"layout, {precision}", expected, seen, holds, seconds=seconds)


def _make_contiguous(trainer: Trainer) -> None:
    """torch's default memory layout in the place of channels-last, from the generator's first maps on."""
    state = trainer.state
    networks: tuple[nn.Module, ...] = (state.generator, state.critic, state.ema)
    for network in networks:
        network.to(memory_format=torch.contiguous_format)
    assert isinstance(state.generator, Generator)
    first_maps = state.generator.first_maps
    state.generator.first_maps = lambda *given: first_maps(*given).contiguous()  # type: ignore[method-assign]


def waits(context: Context, name: str) -> Rows:
    """Steps and their inputs under torch's own guard against calls that wait for the device."""
    for graph in (False, True):
        with context.trainer(name, cuda_graph=graph) as trainer:
            take_steps(trainer, WARM_UP_STEPS)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                take_steps(trainer, WARM_UP_STEPS)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            mode = "graph" if graph else "eager"
            yield row(f"host waits, {name}, {mode}", "none in steps and inputs", "none", True)


def replay(context: Context) -> Rows:
    """One captured step under the profiler: what the device is given, and how long it works on what."""
    with context.trainer(cuda_graph=True) as trainer:
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
    total = sum(seconds.values())
    convolutions = sum(each for name, each in seconds.items() if CONVOLUTIONS.search(name))
    share = convolutions / total if total else 0.0
    seen = f"{len(events)} launches, {total * 1e3:.2f} ms of the device, {share:.0%} of it in convolutions"
    holds = 0 < len(events) <= MOST_LAUNCHES and 0 < share < 1
    kernels = dict(sorted(seconds.items(), key=lambda item: -item[1])[:20])
    expected = f"at most {MOST_LAUNCHES} launches, some of them convolutions"
    yield row("replay", expected, seen, holds, launches=len(events), kernel_seconds=kernels, convolution_share=share)
