"""Measures this machine: `accelerate launch pipeline/benchmark.py [--config FILE] [--json FILE]`.

Everything that is compared is measured in turn, in one run, so that ratios hold while the machine's speed drifts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.flop_counter import FlopCounterMode

from pipeline.baseline import PlainTrainer, fidelity_scores
from pipeline.config import Config, make_parser, parse
from pipeline.data import Dataset, open_dataset
from pipeline.data.resident import ResidentSource, load_split
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluation.scores import KID_SUBSET_SIZE, NEIGHBOURS
from pipeline.export.images import render_range
from pipeline.metrics import evaluate_images, load_features
from pipeline.storage.files import write_text
from pipeline.training.trainer import Trainer

ROUNDS = 7
WARM_UP_STEPS = 3
MATMUL_SIZE = 2048
MATMUL_GFLOP = 2 * MATMUL_SIZE**3 / 1e9
EVALUATION_IMAGES = 500
DATA_BATCHES = 600
"""Batches of a round; at 64 images each a little more than half an epoch of MNIST."""
SCORING_ROUNDS = 3


def main() -> int:
    parser = make_parser("Measure data sources and training steps; what is compared is measured in turn.")
    parser.add_argument("--json", type=Path | None, help="also write the figures to this file, which must not exist")
    parser.add_argument("--steps", type=int, default=30, help="training steps to measure")
    config, arguments = parse(parser)
    if arguments.json is not None and arguments.json.exists():
        raise UserError(f"--json is {arguments.json}: exists already, name another file")
    if arguments.steps < 10:
        raise UserError(f"--steps is {arguments.steps}: give at least 10")
    runtime = Runtime(config.runtime)
    try:
        dataset = runtime.on_main(lambda: open_dataset(config.data))
        # One rank measures the sources: their figures are per core.
        figures = runtime.on_main(lambda: measure_data(config, dataset))
        figures |= measure_training(config, runtime, arguments.steps)
        figures |= measure_scoring(config, runtime, dataset)
    finally:
        runtime.close()
    if runtime.is_main:
        print(json.dumps(figures, indent=1))
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(figures, indent=1))
    return 0


def measure_data(config: Config, dataset: Dataset) -> dict[str, float]:
    """Images per second of CPU time on one thread; ratios to plain webdataset on the same shards."""
    batch_size = config.training.batch_size
    cpu, common = torch.device("cpu"), {"batch_size": batch_size, "seed": 0, "rank": 0, "world_size": 1}
    resident = ResidentSource(dataset, device=cpu, **common)
    lanes = math.gcd(config.data.lanes, batch_size)
    streaming = StreamingSource(dataset, lanes=lanes, workers=0, device=cpu, **common)

    def take(batches: Iterator[Any]) -> Callable[[], int]:
        def measured() -> int:
            return sum(len(next(batches).images) for _ in range(DATA_BATCHES))

        return measured

    plain = _plain_webdataset(dataset)

    def read_plainly() -> int:
        wanted, found = DATA_BATCHES * batch_size, 0
        while found < wanted:
            found += len(next(plain))
        return found

    sources = {
        "resident": take(resident.batches(0)),
        "streaming": take(streaming.batches(0)),
        "plain_webdataset": read_plainly,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for round_number in range(ROUNDS + 1):
        for name, read in sources.items():
            started = time.process_time()  # of this process: what it costs a core, whoever else is on the machine
            count = read()
            if round_number:  # the first one warms caches up
                rates[name].append(count / (time.process_time() - started))
    torch.set_num_threads(threads)
    figures = {f"{name}_images_per_core_second": median(values) for name, values in rates.items()}
    for name in ("resident", "streaming"):
        ratios = [ours / plain for ours, plain in zip(rates[name], rates["plain_webdataset"], strict=True)]
        figures[f"{name}_over_plain_webdataset"] = median(ratios)
    return figures


def _plain_webdataset(dataset: Dataset) -> Iterator[Any]:
    """What a user of webdataset alone would write for these shards: no shuffling, no checks, uint8 arrays."""
    urls = [dataset.locate(shard) for shard in dataset.shards("train")]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False, nodesplitter=_every_shard):
            yield np.load(io.BytesIO(sample["images.npy"]), allow_pickle=False)


def _every_shard(shards: Iterator[Any]) -> Iterator[Any]:
    """In place of webdataset's own default, which refuses to run on one rank of several."""
    return shards


def measure_training(config: Config, runtime: Runtime, steps: int) -> dict[str, Any]:
    """Times, in turn: a step of the real trainer, one of the plain port (pipeline/baseline.py), this machine's matrix
    product, an all-reduce of a step's gradients, and on several ranks a step of one rank that has all threads.

    A checkpoint is started every tenth step; `checkpoint_stall_share` is the time that takes from the training thread,
    by the time of one step. Shares and ratios are medians of paired measurements.
    """
    with contextlib.ExitStack() as stack:
        root = runtime.on_main(tempfile.mkdtemp)
        stack.callback(lambda: runtime.on_main(lambda: shutil.rmtree(root, ignore_errors=True)))
        run = dataclasses.replace(config.run, root=root, trackers=[])
        config = dataclasses.replace(config, run=run)
        trainer = Trainer(config, runtime)
        batches, plain_batches = trainer.source.batches(0), trainer.source.batches(0)
        plain = PlainTrainer(trainer)
        gflop = _count_flop(plain, plain_batches) * runtime.world_size / 1e9
        gradients = _gradient_buffers(trainer)
        threads = torch.get_num_threads()
        single = Trainer(config, runtime.alone()) if runtime.world_size > 1 and runtime.is_main else None
        single_batches = single.source.batches(0) if single else None

        def step() -> None:
            trainer.interval.begin()
            trainer.train_step(batches)
            trainer.interval.losses()  # waits for the device
            trainer.state.step += 1

        def single_step() -> None:
            if single is not None and single_batches is not None:
                os.sched_setaffinity(0, runtime.cores)
                torch.set_num_threads(min(len(runtime.cores), threads * runtime.world_size))
                single.interval.begin()
                single.train_step(single_batches)
                single.interval.losses()
                single.state.step += 1
                torch.set_num_threads(threads)
                runtime.take_cores()

        measured: dict[str, Callable[[], object]] = {
            "step": step,
            "plain": lambda: plain.train_step(plain_batches),
            "matmul": _matmul(runtime.device),
            "all_reduce": lambda: [runtime.sum_over_ranks(buffer) for buffer in gradients],
        }
        if runtime.world_size > 1 and runtime.device.type == "cpu":
            measured["single"] = single_step
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        stalls, waits = [], []
        for number in range(steps + WARM_UP_STEPS):
            for name, work in measured.items():
                runtime.any_rank(False)  # the ranks begin together
                started = time.perf_counter()
                work()
                _wait_for(runtime.device)
                if number >= WARM_UP_STEPS:
                    seconds[name].append(time.perf_counter() - started)
            waits.append(trainer.interval.seconds()[1])
            if number >= WARM_UP_STEPS and number % 10 == 0:
                started = time.perf_counter()
                trainer.save()
                stalls.append(time.perf_counter() - started)
        trainer.writer.finish()
        evaluation_rate = _evaluation_rate(trainer)
    step_seconds = median(seconds["step"])
    ceiling = runtime.world_size * MATMUL_GFLOP / median(seconds["matmul"])
    achieved = gflop / step_seconds
    figures: dict[str, Any] = {
        "device": str(runtime.environment()["device"]),
        "world_size": runtime.world_size,
        "threads_per_rank": threads,
        "precision": config.runtime.precision,
        "gflop_per_step": gflop,
        "ceiling_gflops": ceiling,
        "achieved_gflops": achieved,
        "share_of_ceiling": achieved / ceiling,
        "speedup_over_eager": _ratio(seconds["plain"], seconds["step"]),
        "images_per_second": config.training.n_critic * config.training.batch_size / step_seconds,
        "step_seconds_median": step_seconds,
        "step_seconds_min": min(seconds["step"]),
        "step_seconds_max": max(seconds["step"]),
        "data_wait_share": sum(waits[WARM_UP_STEPS:]) / sum(seconds["step"]),
        "all_reduce_share": median(seconds["all_reduce"]) / step_seconds if runtime.world_size > 1 else 0.0,
        "checkpoint_stall_share": median(stalls) / step_seconds,
        "evaluation_images_per_second": evaluation_rate,
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if runtime.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if "single" in seconds:
        # Only the main process takes these steps, so only its times count.
        figures["speed_over_one_rank"] = runtime.on_main(lambda: _ratio(seconds["single"], seconds["step"]))
    return figures


def measure_scoring(config: Config, runtime: Runtime, dataset: Dataset) -> dict[str, float]:
    """Seconds to score `evaluation.num_images` training digits against the test digits with `mnist` features, and
    torch-fidelity's for FID, Inception Score, KID, precision and recall of the same images, with the same features.

    Real features are cached on either side. Ours give more than those scores. On one CPU process with MNIST only.
    """
    if runtime.world_size > 1 or runtime.device.type != "cpu" or dataset.name != "mnist":
        return {}
    (images, _), (real, _) = (load_split(dataset, split) for split in ("train", "test"))
    images, batch_size = images[: config.evaluation.num_images], config.evaluation.batch_size
    extractor = load_features("mnist", runtime.device, dataset.image_shape)
    with tempfile.TemporaryDirectory() as cache:
        settings = {"feature_extractor": "mnist", "batch_size": batch_size, "prc": True, "prc_neighborhood": NEIGHBOURS}
        settings |= {"kid_subset_size": min(KID_SUBSET_SIZE, len(images))}
        settings |= {"cache_root": cache, "input2_cache_name": "mnist-test"}
        measured: dict[str, Callable[[], object]] = {
            "scoring": lambda: evaluate_images(
                lambda start, stop: images[start:stop],
                len(images),
                dataset,
                [extractor],
                reference="test",
                batch_size=batch_size,
            ),
            "torch_fidelity": lambda: fidelity_scores(images, real, **settings),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for round_number in range(SCORING_ROUNDS + 1):
            for name, work in measured.items():
                started = time.perf_counter()
                work()
                if round_number:  # the first one fills the caches
                    seconds[name].append(time.perf_counter() - started)
    return {
        "scored_images": len(images),
        "scoring_seconds": median(seconds["scoring"]),
        "torch_fidelity_seconds": median(seconds["torch_fidelity"]),
        "scoring_speedup_over_torch_fidelity": _ratio(seconds["torch_fidelity"], seconds["scoring"]),
    }


def _ratio(slow: list[float], fast: list[float]) -> float:
    return median(one / other for one, other in zip(slow, fast, strict=True))


def _count_flop(plain: PlainTrainer, batches: Iterator[Any]) -> int:
    """Floating-point operations of a step on this rank, counted as torch runs it: convolutions and matrix products,
    forward and backward. Of the plain step: what ours does beside that is no useful work."""
    with FlopCounterMode(display=False) as counter:
        plain.train_step(batches)
    return int(counter.get_total_flops())


def _gradient_buffers(trainer: Trainer) -> list[torch.Tensor]:
    """As many numbers as the ranks share in a step: the critic's gradients n_critic times, the generator's once."""
    updates = trainer.config.training.n_critic * (2 if trainer.config.training.critic_updates == "separate" else 1)
    networks = [trainer.state.critic] * updates + [trainer.state.generator]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    return [torch.zeros(size, dtype=trainer.interval.dtype, device=trainer.runtime.device) for size in sizes]


def _matmul(device: torch.device) -> Callable[[], object]:
    """The most float32 arithmetic that one can get here: a large square matrix product."""
    left, right, out = (torch.rand(MATMUL_SIZE, MATMUL_SIZE, device=device) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _evaluation_rate(trainer: Trainer) -> float | None:
    """Images per second that all ranks together render and extract features from; None without evaluations."""
    if trainer.scorer is None:
        return None
    extractor, generator = trainer.scorer.extractors[0], trainer.state.ema
    rates = []
    for start in range(0, 3 * EVALUATION_IMAGES, EVALUATION_IMAGES):
        trainer.runtime.any_rank(False)
        started = time.perf_counter()
        extractor(render_range(generator, 0, start, start + EVALUATION_IMAGES))
        rates.append(trainer.runtime.world_size * EVALUATION_IMAGES / (time.perf_counter() - started))
    return median(rates)


if __name__ == "__main__":
    run_program(main)
