"""What `pipeline/benchmark.py` measures.

Everything that is compared is measured in turn, in one run, and ratios are medians of pairs: they hold while the
machine's speed drifts.
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
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarking.fidelity import fidelity_scores
from pipeline.benchmarking.plain import PlainTrainer
from pipeline.config import Config, to_yaml
from pipeline.data import Dataset
from pipeline.data.resident import ResidentSource, load_split
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpu import bind_to_share
from pipeline.distributed.process import Runtime
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features.mnist import MnistFeatures
from pipeline.evaluation.metrics.kernel import KID_SUBSET_SIZE
from pipeline.export.images import render_range
from pipeline.models.cpu_kernels import faster_form
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import device_name
from pipeline.training.trainer import Trainer

ROUNDS, SCORING_ROUNDS, EVALUATION_ROUNDS, KERNEL_ROUNDS = 7, 3, 3, 5
DATA_BATCHES = 600
"""Batches of a round; at 64 images each a little more than half an epoch of MNIST."""
WARM_UP_STEPS, SAVE_EVERY = 3, 10
NEIGHBOUR_ROUNDS, SETTLING_SECONDS, NEIGHBOUR_SECONDS = 2, 3.0, 2.0
"""Of a round, alone and beside another process."""
MATMUL_SIZE = 2048
EVALUATION_IMAGES = 500
KERNEL_SECONDS = 1.0
"""How long a layer is measured, about; KERNEL_ROUNDS at least."""

Works = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]
"""Of each work in each round."""


def time_in_turn(works: Works, rounds: int, runtime: Runtime, *, warm_up: int = 1) -> Seconds:
    """Runs each work once a round, all ranks beginning together; the first `warm_up` rounds do not count."""
    seconds: Seconds = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            runtime.ranks.any(False)
            started = time.perf_counter()
            work()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    return median(one / other for one, other in zip(slow, fast, strict=True))


def measure_data(config: Config, dataset: Dataset) -> dict[str, float]:
    """Images per second of CPU time on one thread; ratios to plain webdataset on the same shards."""
    batch_size = config.training.batch_size
    given: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "ranks": Ranks(), "device": torch.device("cpu")}
    streaming = StreamingSource(dataset, lanes=math.gcd(config.data.lanes, batch_size), workers=0, **given)
    streams: dict[str, Iterator[Sized]] = {
        "resident": (batch.images for batch in ResidentSource(dataset, **given).batches(0)),
        "streaming": (batch.images for batch in streaming.batches(0)),
        "plain_webdataset": _plain_webdataset(dataset),
    }
    seconds: Seconds = {name: [] for name in streams}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number in range(1 + ROUNDS):
        for name, stream in streams.items():
            started, count = time.process_time(), 0  # of this process: what it costs a core, whoever else is there
            while count < DATA_BATCHES * batch_size:
                count += len(next(stream))
            if number:  # the first one warms caches up
                seconds[name].append((time.process_time() - started) / count)
    torch.set_num_threads(threads)
    figures = {f"{name}_images_per_core_second": 1 / median(each) for name, each in seconds.items()}
    for name in ("resident", "streaming"):
        figures[f"{name}_over_plain_webdataset"] = ratio(seconds["plain_webdataset"], seconds[name])
    return figures


def _plain_webdataset(dataset: Dataset) -> Iterator[Sized]:
    """What a user of webdataset alone would write for these shards: no shuffling, no checks, uint8 arrays."""
    urls = [dataset.locate(shard) for shard in dataset.shards("train")]
    # Its own nodesplitter refuses to run on one rank of several.
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False, nodesplitter=None).repeat()
    return (np.load(io.BytesIO(sample["images.npy"]), allow_pickle=False) for sample in samples)


def measure_training(config: Config, runtime: Runtime, steps: int) -> dict[str, Any]:
    """Times, in turn: a step of the real trainer, one of the plain port (plain.py), this machine's matrix product, an
    all-reduce of a step's gradients, and on several ranks a step of one rank that has all threads. No step is one of a
    burn-in.

    A checkpoint is started every tenth step; `checkpoint_stall_share` is the time that takes from the training thread,
    by the time of one step. Raises TrainingFailed when one fails.
    """
    ranks = runtime.ranks
    with tempfile.TemporaryDirectory() as folder:
        ordinary = replace(config.training, burn_in_n_critic=None)
        # A save that fails ends the benchmark: the time of one that wrote nothing is no figure.
        run = replace(config.run, root=ranks.broadcast(folder), trackers=[], max_save_failures=0)
        config = replace(config, run=run, training=ordinary)
        trainer = Trainer(config, runtime)
        ranks.on_main(lambda: write_text(trainer.folder.config, to_yaml(config)))  # a folder without it is no run
        plain, gradients, waited = PlainTrainer(trainer), _gradient_buffers(trainer), [0.0]
        # Of convolutions and matrix products. What a step of ours does beside the plain one is no useful work.
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
    on_cuda = runtime.device.type == "cuda"
    figures = {
        "device": device_name(runtime.device, len(runtime.cores)),
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "precision": config.runtime.precision,
        "gflop_per_step": gflop,
        "ceiling_gflops": ceiling,
        "achieved_gflops": gflop / step_seconds,
        "share_of_ceiling": gflop / step_seconds / ceiling,
        "speedup_over_eager": ratio(seconds["plain"], seconds["step"]),
        "images_per_second": config.training.n_critic * config.training.batch_size / step_seconds,
        "step_seconds_median": step_seconds,
        "step_seconds_min": min(seconds["step"]),
        "step_seconds_max": max(seconds["step"]),
        "all_reduce_share": median(seconds["all_reduce"]) / step_seconds if world_size > 1 else 0.0,
        # The first save, which imports what it takes, was in a round of the warm-up.
        "checkpoint_stall_share": median(seconds["save"][SAVE_EVERY - WARM_UP_STEPS :: SAVE_EVERY]) / step_seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if "single" in seconds:
        # Only the main process takes these steps, so only its times count.
        figures["speed_over_one_rank"] = runtime.ranks.on_main(lambda: ratio(seconds["single"], seconds["step"]))
    return figures


def _take_step(trainer: Trainer) -> None:
    trainer.log.begin()
    trainer.take_step()
    trainer.log.losses()  # waits for the device


def _single_step(config: Config, runtime: Runtime) -> Callable[[], None]:
    """A step that the main rank takes as if it were alone, with the threads of all; nothing on the others."""
    # In a folder of its own: the other trainer's holds its run.
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


def _gradient_buffers(trainer: Trainer) -> list[Tensor]:
    """As many numbers as the ranks share in a step: the critic's gradients in each of its updates, the generator's."""
    training, state = trainer.config.training, trainer.state
    updates = training.n_critic * (2 if training.critic_updates == "separate" else 1)
    shared = [list(network.parameters()) for network in [state.critic] * updates + [state.generator]]
    return [shares[0].new_zeros(sum(share.numel() for share in shares)) for shares in shared]


def _evaluation_rate(trainer: Trainer) -> float | None:
    """Images per second that all ranks together render and extract features from; None without evaluations."""
    if trainer.scorer is None:
        return None
    extractor, generator = trainer.scorer.extractors[0], trainer.state.ema
    works = {"evaluation": lambda: extractor(render_range(generator, 0, 0, EVALUATION_IMAGES))}
    seconds = time_in_turn(works, EVALUATION_ROUNDS, trainer.runtime)["evaluation"]
    return trainer.runtime.ranks.world_size * EVALUATION_IMAGES / median(seconds)


def measure_neighbour(trainer: Trainer) -> float:
    """How many times as long steps take beside another process of this machine that never waits.

    It takes 20 seconds: threads need some of them to find that they are not alone, or are again
    (distributed/cpu.py).
    """
    runtime, seconds = trainer.runtime, Seconds(beside=[], alone=[])
    for _ in range(NEIGHBOUR_ROUNDS):
        for name, found in seconds.items():
            comes = name == "beside" and runtime.ranks.is_main
            with _busy_process(runtime.cores) if comes else nullcontext():
                _seconds_a_step(trainer, SETTLING_SECONDS)
                found.append(_seconds_a_step(trainer, NEIGHBOUR_SECONDS))
    return runtime.ranks.on_main(lambda: ratio(seconds["beside"], seconds["alone"]))


def _seconds_a_step(trainer: Trainer, at_least: float) -> float:
    """Over so many seconds."""
    started, steps = time.perf_counter(), 0
    while trainer.runtime.ranks.any(time.perf_counter() - started < at_least):
        _take_step(trainer)
        steps += 1
    return (time.perf_counter() - started) / steps


@contextmanager
def _busy_process(cores: list[int]) -> Iterator[None]:
    """One that may run on any of the cores, in a session of its own as another user's is: Linux shares cores out by
    session. It ends with this one."""
    program = f"import os; os.sched_setaffinity(0, {cores})\nwhile os.getppid() == {os.getpid()}: pass"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the process beside the steps ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def measure_kernels(trainer: Trainer) -> list[dict[str, Any]]:
    """For each layer of the networks that has a form of its own on CPUs (pipeline/models/cpu_kernels.py), a forward and
    backward pass with it and with torch's own, on the images that the layer first gets in a step, which is taken.

    About a second a layer. Each rank measures by itself, all at the same time.
    """
    networks = nn.ModuleDict({"generator": trainer.state.generator, "critic": trainer.state.critic})
    layers = {name: layer for name, layer in networks.named_modules() if faster_form(layer) is not None}
    inputs: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.setdefault(layer, given[0].detach().requires_grad_())

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

    alone = runtime.alone()
    works = {"form": partial(differentiate, form), "stock": partial(differentiate, stock)}
    once = sum(seconds for [seconds] in time_in_turn(works, 1, alone).values())
    found = time_in_turn(works, max(KERNEL_ROUNDS, int(KERNEL_SECONDS / once)), alone)
    medians = {"seconds": median(found["form"]), "stock_seconds": median(found["stock"])}
    return {"form": form.__name__, **medians, "speedup": ratio(found["stock"], found["form"])}


def measure_scoring(config: Config, runtime: Runtime, dataset: Dataset) -> dict[str, float]:
    """Seconds to score `evaluation.num_images` training digits against the test digits with `mnist` features, and
    torch-fidelity's for FID, Inception Score, KID, precision and recall of the same images, with the same features.

    Real features are cached on either side. Ours give more than those scores. On one CPU process with MNIST only.
    """
    if runtime.ranks.world_size > 1 or runtime.device.type != "cpu" or dataset.kind != "mnist":
        return {}
    (images, _), (real, _) = (load_split(dataset, split) for split in ("train", "test"))
    images, batch_size = images[: config.evaluation.num_images], config.evaluation.batch_size
    ours, extractors = ImageSet.of_tensor(images), [MnistFeatures(runtime.device)]
    against_test = replace(config.evaluation, reference="test")
    theirs: dict[str, Any] = {"feature_extractor": "mnist", "batch_size": batch_size, "input2_cache_name": "mnist-test"}
    theirs |= {
        "prc": True,
        "prc_neighborhood": config.evaluation.neighbours,
        "kid_subset_size": min(KID_SUBSET_SIZE, len(images)),
    }
    with tempfile.TemporaryDirectory() as cache:
        works: Works = {
            "scoring": lambda: evaluate_images(ours, dataset, extractors, against_test),
            "torch_fidelity": lambda: fidelity_scores(images, real, cache_root=cache, **theirs),
        }
        seconds = time_in_turn(works, SCORING_ROUNDS, runtime)  # its warm-up fills the caches
    return {
        "scored_images": len(images),
        "scoring_seconds": median(seconds["scoring"]),
        "torch_fidelity_seconds": median(seconds["torch_fidelity"]),
        "scoring_speedup_over_torch_fidelity": ratio(seconds["torch_fidelity"], seconds["scoring"]),
    }
