"""Checks of what a GPU computes: one trajectory whoever computes it, features, losses, quality."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch

from pipeline.benchmarking.gpu_check.context import Context, Walk, snapshot, take_steps, walk, without_graphs
from pipeline.benchmarking.gpu_check.table import FAILED, Row, Rows, row, within
from pipeline.checks.machine import find_dataset
from pipeline.config import EvaluationConfig
from pipeline.errors import Preempted, UserError
from pipeline.evaluation.features import inception
from pipeline.evaluation.features.base import FeatureExtractor
from pipeline.evaluation.features.mnist import MnistFeatures
from pipeline.training.build import build_step

STEPS, STOPS = 4, 2
EXACT = 1e-9
"""Largest difference of losses and states in float64: rounding is a hundredth of it."""
FLOAT32_LOSSES, FLOAT32_WEIGHTS = 2e-5, 1e-2
"""Of losses near 1, and of `Walk.deviation`: on a CPU, four steps of LSGAN at a quarter of the width came within 1.7e-6
and 1.9e-3 of float64's in float32, and within 1.6e-3 and 8.4e-2 in bfloat16, whose rounding is eight times
TensorFloat-32's."""
WALKS = (("lsgan", "float32"), ("wgan", "float64"))
"""Weights that WGAN clips say little: the first clip moves them furthest."""
FEATURES = 1e-5
"""By the largest feature: TensorFloat-32 would leave some 5e-4."""
FP16_STEPS = 200
BLOCKS = (500, 1000, 1500)
"""Steps of the training, evaluated after each block: both averages and optimisers have settled after the first."""
EVALUATED_IMAGES = 5000
MIB = 2**20


def graph_against_eager(context: Context, name: str) -> Rows:
    """The graph against the very step that it captured, and in float64 against a run without graphs."""
    with context.trainer(name, cuda_graph=True) as trainer:
        captured = walk(trainer, STEPS)
    with context.trainer(name, cuda_graph=True) as trainer:
        runtime = without_graphs(trainer.runtime)
        trainer.step = build_step(trainer.config, trainer.objective, trainer.state, runtime)
        yield within(f"graph, {name}, float32", 0, captured.difference(walk(trainer, STEPS)), "the same step eagerly,")
    walks = []
    for graph in (True, False):
        with context.trainer(name, precision="float64", cuda_graph=graph) as trainer:
            walks.append(walk(trainer, STEPS))
    yield within(f"graph, {name}, float64", EXACT, walks[0].difference(walks[1]), "a run without graphs")


def walk_on_cpu(context: Context) -> Rows:
    """Leaves its walks for `against_cpu`."""
    for name, precision in WALKS:
        with context.trainer(name, device="cpu", precision=precision) as trainer:
            found = walk(trainer, STEPS)
        torch.save(found._asdict(), _cpu_walk(context, precision))
        seen = " ".join(f"{loss:.6f}" for loss in found.losses[-1].tolist())
        yield row(f"CPU, {name}, {precision}", "finite losses", seen, bool(found.losses.isfinite().all()))


def against_cpu(context: Context) -> Rows:
    for name, precision in WALKS:
        with context.trainer(name, precision=precision, cuda_graph=False) as trainer:
            ours, theirs = walk(trainer, STEPS), Walk(**torch.load(_cpu_walk(context, precision)))
        check = f"GPU against CPU, {name}, {precision}"
        if precision == "float64":
            yield within(check, EXACT, ours.difference(theirs), "losses and states")
        else:
            losses = (ours.losses - theirs.losses).abs().max().item()
            yield within(f"{check}, losses", FLOAT32_LOSSES, losses, "losses")
            yield within(f"{check}, weights", FLOAT32_WEIGHTS, ours.deviation(theirs), "weights, by their way,")


def _cpu_walk(context: Context, precision: str) -> Path:
    return context.folder / f"cpu-{precision}.pt"


def resume(context: Context, graph: bool) -> Rows:
    """Stops by a signal, each after a step that is saved, against a run without."""
    ends = []
    for name, stops in (("whole", 0), ("stopped", STOPS)):
        settings = {"training.steps": STEPS, "runtime.cuda_graph": graph, "run.name": f"{name}-{graph}"}
        config = context.config("wgan", settings)
        for _ in range(stops):
            with context.trainer_of(config) as trainer:
                signal.raise_signal(signal.SIGTERM)
                try:
                    trainer.run()
                except Preempted:
                    continue
                raise RuntimeError("a signal did not stop the run")
        with context.trainer_of(config) as trainer:
            trainer.run()
            ends.append(Walk(torch.zeros(1), {}, snapshot(trainer)))
    mode = "captured" if graph else "eager"
    yield within(f"stop and resume, {mode}", 0, ends[1].difference(ends[0]), "an uninterrupted run")


def features(context: Context) -> Rows:
    """With TensorFloat-32 allowed all around: the extractors switch it off. Inception's only where its weights are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randint(256, (500, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weights = inception.WEIGHTS.path(EvaluationConfig())
    spaces: dict[str, Callable[[torch.device], FeatureExtractor]] = {"mnist": MnistFeatures}
    if weights.is_file():
        spaces["inception"] = partial(inception.InceptionFeatures, weights)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name, space in spaces.items():
        shown = images if name == "mnist" else images[:50]
        ours, theirs = (space(each)(shown)[0] for each in (device, torch.device("cpu")))
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        yield within(f"features, {name}", FEATURES, difference, "the CPU's, by their largest,")


def fp16(context: Context) -> Rows:
    with context.trainer(precision="fp16", cuda_graph=False) as trainer:
        take_steps(trainer, FP16_STEPS)
        losses, scale = trainer.log.losses(), trainer.state.scaler.get_scale()
    # It begins at 2^16, and a growth takes 2,000 updates without an overflow.
    holds = bool(losses.isfinite().all()) and 2**4 <= scale <= 2**18
    seen = f"last losses {[round(loss, 4) for loss in losses[-1].tolist()]}, scale {scale:.0f}"
    yield row(f"fp16, {FP16_STEPS} steps", "finite losses, scale in 2^4 to 2^18", seen, holds, scale=scale)


def training(context: Context) -> Rows:
    """The reference on MNIST, captured: memory stays where it is, FID falls."""
    settings = {"data.dataset": "mnist", "evaluation.every": sum(BLOCKS), "evaluation.num_images": EVALUATED_IMAGES}
    config = context.config("wgan", settings | {"run.name": "training", "runtime.cuda_graph": True})
    try:
        find_dataset(config)
    except UserError as error:
        text = f"{error}, and copy that folder here or name it with -- --data.root"
        yield Row("training", "memory flat, FID falling", text, FAILED)
        return
    fids, device_memory, host_memory = [], [], []
    with context.trainer_of(config) as trainer:
        for steps in BLOCKS:
            take_steps(trainer, steps)
            step, folder = trainer.state.step, trainer.folder
            assert trainer.scorer is not None
            scores = trainer.scorer.score_generator(
                trainer.state.copied_generator("ema"), folder.scores(step), {"step": step}
            )
            fids.append(scores["features"]["mnist"]["fid"])
            trainer.log.begin()
            device_memory.append(torch.cuda.memory_allocated())
            host_memory.append(psutil.Process().memory_info().rss)
    grown = device_memory[-1] - device_memory[1], host_memory[-1] - host_memory[1]
    seen = f"{grown[0] / MIB:+.1f} MiB, host {grown[1] / MIB:+.0f} MiB"
    expected = f"in the last {BLOCKS[-1]:,} steps at most 1 MiB, host 64 MiB more"
    flat = grown[0] <= MIB and grown[1] <= 64 * MIB
    yield row("training, memory", expected, seen, flat, device=device_memory, host=host_memory)
    falling = fids == sorted(fids, reverse=True) and fids[-1] < fids[0]
    seen = " > ".join(f"{fid:.1f}" for fid in fids)
    yield row(f"training, FID over {sum(BLOCKS):,} steps", "falling", seen, falling, fids=fids)
