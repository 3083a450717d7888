"""Measures this machine: `accelerate launch pipeline/benchmark.py [--config FILE] [--json FILE]`.

Everything that is compared is measured in turn, in one run, so that ratios hold while the machine's speed drifts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
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

from pipeline.config import Config, UserError, make_parser, parse
from pipeline.data import Dataset, open_dataset
from pipeline.data.resident import ResidentSource
from pipeline.data.streaming import StreamingSource
from pipeline.files import write_text
from pipeline.runtime import Runtime, run_entry
from pipeline.trainer import Trainer

ROUNDS = 7
DATA_BATCHES = 600
"""Batches of a round; at 64 images each a little more than half an epoch of MNIST."""


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
    """Steps of the real trainer in a temporary folder, with a checkpoint every tenth step.

    `checkpoint_stall_share` is the time that a save takes from the training thread, by the time of one step.
    """
    with contextlib.ExitStack() as stack:
        root = runtime.on_main(tempfile.mkdtemp)
        stack.callback(lambda: runtime.on_main(lambda: shutil.rmtree(root, ignore_errors=True)))
        run = dataclasses.replace(config.run, root=root, trackers=[])
        evaluation = dataclasses.replace(config.evaluation, every=None)
        trainer = Trainer(dataclasses.replace(config, run=run, evaluation=evaluation), runtime)
        batches = trainer.source.batches(0)
        durations, stalls, waits = [], [], []
        for step in range(steps + 3):
            trainer.interval.begin()
            started = time.perf_counter()
            trainer.train_step(batches)
            trainer.interval.losses()  # waits for the device
            trainer.state.step += 1
            if step >= 3:
                durations.append(time.perf_counter() - started)
                waits.append(trainer.interval.seconds()[1])
            if step >= 3 and step % 10 == 0:
                started = time.perf_counter()
                trainer.save()
                stalls.append(time.perf_counter() - started)
        trainer.writer.finish()
    training = config.training
    step_seconds = median(durations)
    return {
        "world_size": runtime.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "step_seconds_median": step_seconds,
        "step_seconds_min": min(durations),
        "step_seconds_max": max(durations),
        "images_per_second": training.n_critic * training.batch_size / step_seconds,
        "data_wait_share": sum(waits) / sum(durations),
        "checkpoint_stall_share": median(stalls) / step_seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if runtime.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    run_entry(main)
