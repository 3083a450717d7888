"""The figures of `pipeline/benchmark.py`.

All that is compared is measured in turn in one run, and ratios are medians over rounds: they hold while the speed of
the machine drifts.
"""

from __future__ import annotations

import io
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarking.plain import PlainTrainer
from pipeline.config import Config, to_yaml
from pipeline.data import Dataset
from pipeline.data.resident import ResidentSource
from pipeline.data.samples import BLOCK
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpu import bind_to_share
from pipeline.distributed.process import Runtime
from pipeline.export.images import render_range
from pipeline.models.cpu_kernels import faster_form
from pipeline.storage.files import write_text
from pipeline.training.trainer import Trainer

DATA_ROUNDS, EVALUATION_ROUNDS = 7, 3
DATA_BATCHES = 600
"""Number of batches in a round: of 64 images each, a little more than half an epoch of MNIST."""
WARM_UP_STEPS, SAVE_EVERY = 3, 10
NEIGHBOUR_ROUNDS, SETTLING_SECONDS, NEIGHBOUR_SECONDS = 2, 3.0, 2.0
"""A round beside another process, and alone: seconds that do not count, then seconds that do."""
MATMUL_SIZE = 2048
EVALUATION_IMAGES = 500
KERNEL_ROUNDS = 15

Works = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]
"""Name of a work -> its seconds in each round."""


def time_in_turn(
    works: Works, rounds: int, runtime: Runtime, *, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> Seconds:
    """Runs the works one after the other in each round and returns their seconds. All ranks begin a work together; the
    first `warm_up` rounds do not count."""
    seconds: Seconds = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            runtime.ranks.any(False)
            started = clock()
            work()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Returns how many times as long the first works take as the second: the median over rounds."""
    return median(one / other for one, other in zip(slow, fast, strict=True))


def measure_data(config: Config, runtime: Runtime, dataset: Dataset) -> dict[str, float]:
    """Measures images per second of CPU time on one thread, of both sources and of plain webdataset on the same
    shards. Only one rank calls it: the figures are those of a core."""
    batch_size = config.training.batch_size
    num_images = DATA_BATCHES * batch_size
    arguments: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "ranks": Ranks(), "device": torch.device("cpu")}
    streaming = StreamingSource(dataset, lanes=math.gcd(config.data.lanes, batch_size), workers=0, **arguments)
    streams: dict[str, Iterator[Sized]] = {
        "resident": (batch.images for batch in ResidentSource(dataset, **arguments).batches(0)),
        "streaming": (batch.images for batch in streaming.batches(0)),
        "plain_webdataset": _plain_webdataset(dataset),
    }

    def read(stream: Iterator[Sized]) -> None:
        count = 0
        while count < num_images:
            count += len(next(stream))

    works = {name: partial(read, stream) for name, stream in streams.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = time_in_turn(works, DATA_ROUNDS, runtime.alone(), clock=time.process_time)
    torch.set_num_threads(threads)
    figures = {f"{name}_images_per_core_second": num_images / median(seconds[name]) for name in works}
    for name in ("resident", "streaming"):
        figures[f"{name}_over_plain_webdataset"] = ratio(seconds["plain_webdataset"], seconds[name])
    return figures


def _plain_webdataset(dataset: Dataset) -> Iterator[Sized]:
    """Yields blocks of images as a user of webdataset alone would read these shards: unshuffled, unchecked."""
    urls = [dataset.locate(shard) for shard in dataset.shards("train")]
    # nodesplitter: the default one refuses to run on one rank of several.
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False, nodesplitter=None).repeat()
    for sample in samples:
        if key := next((key for key in dataset.reading.image_key.split(";") if key in sample), None):
            content = io.BytesIO(sample[key])
            yield np.load(content, allow_pickle=False) if key == BLOCK else np.asarray(Image.open(content))[None]


def measure_training(config: Config, runtime: Runtime, steps: int) -> dict[str, Any]:
    """Times in turn: a step of the trainer, one of the plain port (plain.py), the machine's matrix product, an
    all-reduce of a step's gradients, a checkpoint every tenth step and, on several CPU ranks, a step of one rank that
    has the threads of all. No step is one of a burn-in.

    `checkpoint_stall_share` is the time that a checkpoint takes from the training thread, by the time of a step.

    Raises:
        TrainingFailed: a checkpoint can't be written. The time of one that wrote nothing would be no figure.
    """
    ranks = runtime.ranks
    with tempfile.TemporaryDirectory() as folder:
        run = replace(config.run, root=ranks.broadcast(folder), trackers=[], max_save_failures=0)
        config = replace(config, run=run, training=replace(config.training, burn_in_n_critic=None))
        trainer = Trainer(config, runtime)
        ranks.on_main(lambda: write_text(trainer.folder.config, to_yaml(config)))  # without it the folder is no run
        plain, waited, weight = PlainTrainer(trainer), [0.0], next(trainer.state.critic.parameters())
        # As many numbers as the ranks all-reduce in a step: the gradients of each update, critic and generator.
        updates = config.training.n_critic * (2 if config.training.critic_updates == "separate" else 1)
        counts = trainer.state.num_weights
        gradients = [weight.new_zeros(count) for count in [counts["critic"]] * updates + [counts["generator"]]]
        # The plain step's convolutions and matrix products: what a step of ours computes beside them is no useful work.
        with FlopCounterMode(display=False) as counter:
            plain.take_step()
        # A large square matrix product is the most float32 arithmetic that one can get here.
        left, right, out = (torch.rand(MATMUL_SIZE, MATMUL_SIZE, device=runtime.device) for _ in range(3))

        def step() -> None:
            _take_step(trainer)
            waited.append(trainer.inputs.wait_seconds)

        works: dict[str, Callable[[], object]] = {
            "step": step,
            "plain": plain.take_step,
            "matmul": partial(torch.mm, left, right, out=out),
            "all_reduce": lambda: [ranks.sum(buffer) for buffer in gradients],
        }
        if ranks.world_size > 1 and runtime.device.type == "cpu":
            works["single"] = _single_step(config, runtime)
        works["save"] = lambda: trainer.saver.save() if trainer.state.step % SAVE_EVERY == 1 else None
        seconds = time_in_turn(works, steps, runtime, warm_up=WARM_UP_STEPS)
        trainer.saver.save_now()
        figures = _speeds(config, runtime, seconds, counter.get_total_flops() * ranks.world_size / 1e9) | {
            "data_wait_share": (waited[-1] - waited[WARM_UP_STEPS]) / sum(seconds["step"]),
            "evaluation_images_per_second": _evaluation_rate(trainer),
        }
        if runtime.device.type == "cpu":
            figures["slowdown_beside_one_process"] = measure_neighbour(trainer)
            figures["kernels"] = measure_kernels(trainer)
        trainer.inputs.close()
        plain.inputs.close()
    return figures


def _speeds(config: Config, runtime: Runtime, seconds: Seconds, gflop: float) -> dict[str, Any]:
    world_size, step_seconds = runtime.ranks.world_size, median(seconds["step"])
    ceiling = world_size * 2 * MATMUL_SIZE**3 / 1e9 / median(seconds["matmul"])
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of this process, in KiB on Linux
    figures = {
        **runtime.hardware,
        "precision": config.runtime.precision,
        "gflop_per_step": gflop,
        "ceiling_gflops": ceiling,
        "achieved_gflops": gflop / step_seconds,
        "share_of_ceiling": gflop / step_seconds / ceiling,
        "speedup_over_eager": ratio(seconds["plain"], seconds["step"]),
        "images_per_second": config.training.n_critic * config.training.batch_size / step_seconds,
        "step_seconds_median": step_seconds,
        "all_reduce_share": median(seconds["all_reduce"]) / step_seconds if world_size > 1 else 0.0,
        # The first save, which imports what it needs, was in a round of the warm-up.
        "checkpoint_stall_share": median(seconds["save"][SAVE_EVERY - WARM_UP_STEPS :: SAVE_EVERY]) / step_seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if runtime.device.type == "cuda" else peak_kib * 1024,
    }
    if "single" in seconds:  # only the main rank takes these steps, so only its times count
        figures["speed_over_one_rank"] = runtime.ranks.on_main(lambda: ratio(seconds["single"], seconds["step"]))
    return figures


def _take_step(trainer: Trainer) -> None:
    trainer.log.begin()
    trainer.take_step()
    trainer.log.losses()  # waits for the device


def _single_step(config: Config, runtime: Runtime) -> Callable[[], None]:
    """Returns a step that the main rank takes as if it were alone, with the threads of all; the others do nothing."""
    # A folder of its own: the other trainer's holds that trainer's run.
    config = replace(config, run=replace(config.run, name=f"{config.run.name}-alone"))
    single = Trainer(config, runtime.alone()) if runtime.ranks.is_main else None
    threads = torch.get_num_threads()

    def step() -> None:
        if single is not None:
            os.sched_setaffinity(0, runtime.cores)
            torch.set_num_threads(min(len(runtime.cores), threads * runtime.ranks.world_size))
            _take_step(single)
            torch.set_num_threads(threads)
            bind_to_share(runtime.cores)

    return step


def _evaluation_rate(trainer: Trainer) -> float | None:
    """Returns images per second that all ranks together render and extract features from; None without evaluations."""
    if trainer.scorer is None:
        return None
    extractor, generator = trainer.scorer.extractors[0], trainer.state.ema
    works = {"evaluation": lambda: extractor(render_range(generator, 0, 0, EVALUATION_IMAGES))}
    seconds = time_in_turn(works, EVALUATION_ROUNDS, trainer.runtime)["evaluation"]
    return trainer.runtime.ranks.world_size * EVALUATION_IMAGES / median(seconds)


def measure_neighbour(trainer: Trainer) -> float:
    """Measures how many times as long steps take beside another process that never waits and may use any of the cores.

    It has a session of its own, as another user's process has, because Linux shares cores out by session. It takes 20
    seconds: OpenMP's threads need some to notice that they are not alone, or are again (`distributed/cpu.py`).
    """
    ranks, cores, seconds = trainer.runtime.ranks, trainer.runtime.cores, Seconds(beside=[], alone=[])
    program = f"import os; os.sched_setaffinity(0, {cores})\nwhile os.getppid() == {os.getpid()}: pass"

    def step_seconds(at_least: float) -> float:
        started, steps = time.perf_counter(), 0
        while ranks.any(time.perf_counter() - started < at_least):
            _take_step(trainer)
            steps += 1
        return (time.perf_counter() - started) / steps

    for _ in range(NEIGHBOUR_ROUNDS):
        for name, rounds in seconds.items():
            with ExitStack() as neighbours:
                if name == "beside" and ranks.is_main:
                    other = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
                    neighbours.enter_context(other)  # waits for its end
                    neighbours.callback(other.kill)
                step_seconds(SETTLING_SECONDS)
                rounds.append(step_seconds(NEIGHBOUR_SECONDS))
    return ranks.on_main(lambda: ratio(seconds["beside"], seconds["alone"]))


def measure_kernels(trainer: Trainer) -> list[dict[str, Any]]:
    """Times each layer of the networks that has a faster form on CPUs (pipeline/models/cpu_kernels.py): a forward and
    backward pass in that form and in torch's, on the images that the layer gets first in a step, which is taken.

    It takes about a second a layer. All ranks measure at the same time, each for itself.
    """
    networks = nn.ModuleDict({"generator": trainer.state.generator, "critic": trainer.state.critic})
    layers = {name: layer for name, layer in networks.named_modules() if faster_form(layer) is not None}
    inputs: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.setdefault(layer, arguments[0].detach().requires_grad_())

    hooks = [layer.register_forward_pre_hook(remember) for layer in layers.values()]
    trainer.take_step()
    for hook in hooks:
        hook.remove()
    return [{"layer": name} | _time_form(layer, inputs[layer], trainer.runtime) for name, layer in layers.items()]


def _time_form(layer: nn.Module, images: Tensor, runtime: Runtime) -> dict[str, Any]:
    form, stock = faster_form(layer), type(layer).forward
    assert form is not None
    with torch.no_grad(), runtime.autocast():
        upstream = torch.rand_like(layer(images), memory_format=torch.channels_last)  # as it comes in a step

    def differentiate(forward: Callable[..., Tensor]) -> None:
        with runtime.autocast():
            outputs = forward(layer, images)
        torch.autograd.grad(outputs, [images, *layer.parameters()], upstream)

    works = {"form": partial(differentiate, form), "stock": partial(differentiate, stock)}
    seconds = time_in_turn(works, KERNEL_ROUNDS, runtime.alone())
    return {
        "form": form.__name__,
        "seconds": median(seconds["form"]),
        "stock_seconds": median(seconds["stock"]),
        "speedup": ratio(seconds["stock"], seconds["form"]),
    }
