"""One process of a job: its ranks, its device and arithmetic, how networks are wrapped, and what it prints.

accelerate is used here and nowhere else: for the device, the precision, data parallelism and trackers.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from tqdm import tqdm

from pipeline.compat import fresh_accelerate, leave_buffers_alone, settle_buckets, stop_timing
from pipeline.config import RunConfig, RuntimeConfig
from pipeline.distributed import launcher
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpu import available_cores, release_freed_memory, restoring_cpu, sharing_the_cores, use_cpu
from pipeline.distributed.slurm import JobComment
from pipeline.distributed.stopping import StopRequest, restoring_signals
from pipeline.errors import UserError


class Runtime:
    """This process as the programs see it. Building it joins the ranks and prepares the device; `close` ends that.

    Raises:
        UserError: there is no CUDA device although one is asked for, or the launcher started another number of
            processes than it was asked for.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.cores = available_cores()
        """The machine's cores, which its ranks share where they compute on a CPU."""
        self.stop = StopRequest()
        has_cuda = torch.cuda.is_available() and not (config.device == "auto" and launcher.is_set("ACCELERATE_USE_CPU"))
        on_cuda, self.captures = choose_device(config, has_cuda)
        launcher.refuse_unfit_launch()
        world_size = launcher.read_number("WORLD_SIZE", 1)
        self.before_close = contextlib.ExitStack()
        """Callbacks for what has to end before the process group does: graphs that hold its collectives."""
        if not on_cuda:
            use_cpu(self.cores, config.threads)
        timeout = timedelta(seconds=config.timeout_seconds)
        self.ranks = Ranks()
        if several := world_size > 1:
            from pipeline.distributed.rendezvous import join_process_group  # here: most processes are alone

            self.ranks = self.stop.ranks = join_process_group("nccl" if on_cuda else "gloo", timeout)
        with launcher.environment_without_accelerate(keep_ranks=several):
            self.accelerator = Accelerator(
                cpu=not on_cuda,
                mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
                # All gradients of a network in one collective. At the default of 25 MiB torch makes a first one of 1.
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=26)],
            )
        assert self.accelerator.num_processes == world_size
        self.device = torch.empty(0, device=self.accelerator.device).device
        """The device under the name that its tensors have: accelerate's `cpu:0` is not equal to `cpu`, so `.to` would
        copy tensors that are already there."""
        self.scaler: torch.amp.GradScaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)
        """The scaler of losses; disabled unless the precision is fp16."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        # A resumed run equals an uninterrupted one bit for bit only if the same kernels are chosen every time.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        self.capture_stream = torch.cuda.Stream() if self.captures else None  # type: ignore[no-untyped-call]
        """The stream on which DDP is built, warmed up and captured, where steps are captured as CUDA graphs."""
        self.comment = JobComment().set
        for line in launcher.ignored_settings(config):
            self.print(line)
        self._watch = contextlib.ExitStack()
        if not on_cuda and torch.get_num_threads() > 1:  # last: if a line above raised, nothing would end its thread
            self._watch.enter_context(sharing_the_cores())

    def autocast(self) -> AbstractContextManager[None]:
        """Returns the context of a wrapped network's forward pass: the arithmetic of `runtime.precision`."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def wrap(self, network: nn.Module, *, data_parallel: bool = True) -> nn.Module:
        """Returns the network with its forward pass under `autocast` and, if `data_parallel`, its gradients averaged
        over the ranks during the backward pass."""
        leave_buffers_alone(network)
        alone = not data_parallel or self.ranks.world_size == 1
        with on_stream(self.capture_stream):
            wrapped: nn.Module = self.accelerator.prepare_model(network, device_placement=False, evaluation_mode=alone)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            settle_buckets(wrapped)
            for weight in network.parameters():
                if weight.is_contiguous():  # with one channel, channels-last or not is the same memory, other strides
                    # DDP copies a gradient of other strides than the parameter's into its bucket, and warns.
                    strided = partial(torch.as_strided, size=weight.shape, stride=weight.stride())
                    weight.register_hook(strided)  # type: ignore[no-untyped-call]
            stop_timing(wrapped)
        return wrapped

    def alone(self) -> Runtime:
        """Returns this process as if it were the only one, to compare with."""
        single = copy.copy(self)
        single.ranks = Ranks()
        return single

    @property
    def hardware(self) -> dict[str, Any]:
        """The number of ranks, a rank's threads, the GPU's name (or the processor's, after the number of this machine's
        cores), and how many GPUs or cores all ranks compute on."""
        ranks, threads = self.ranks.world_size, torch.get_num_threads()
        if self.device.type == "cuda":
            name, devices = torch.cuda.get_device_name(self.device), {"GPU": ranks}
        else:
            path = Path("/proc/cpuinfo")
            models = re.findall(r"(?m)^model name\s*: (.*)$", path.read_text() if path.exists() else "")
            name, devices = f"{len(self.cores)} x {models[0] if models else 'CPU'}", {"core": ranks * threads}
        return {"world_size": ranks, "threads_per_rank": threads, "device": name, "devices": devices}

    def __str__(self) -> str:
        """Names the number of ranks and the device."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.ranks.world_size} rank{'s' * (self.ranks.world_size > 1)} on {name}"

    # -- what a person sees --------------------------------------------------------------------------------------------

    def print(self, line: str) -> None:
        """Prints a line on the main rank's standard error, above the progress bar."""
        if self.ranks.is_main:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    @contextlib.contextmanager
    def tolerating(self, subject: str) -> Iterator[None]:
        """Prints an OSError of the block, as from a full disk, and goes on: only checkpoints end a run that cannot be
        written."""
        try:
            yield
        except OSError as error:
            self.print(f"{subject} not written: {error}")

    def close(self) -> None:
        """Ends what the Runtime started: graphs, threads, trackers, the process group."""
        self.before_close.close()
        self._watch.close()
        with self.tolerating("the trackers' last lines"):
            self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.device.type == "cpu":
            release_freed_memory()


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs the block on a CUDA stream, after the current stream's work so far and before its later work; on the current
    stream if `stream` is None."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def restoring_process() -> Iterator[None]:
    """Restores, at the end of the block, what a Runtime and a run change in their process, for a notebook that goes on
    in it: signal handlers, cores, threads, arithmetic, torch's random numbers and accelerate's idea of the device."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    # Networks draw their first weights from torch's global generator before their own are copied in.
    with torch.random.fork_rng(devices=[]), restoring_signals(), fresh_accelerate():
        before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
        try:
            with restoring_cpu():
                yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


# -- experiment trackers -----------------------------------------------------------------------------------------------


def check_trackers(run: RunConfig) -> str:
    """Returns the trackers' names as text.

    Raises:
        UserError: accelerate does not know a tracker, its package is missing, or options are of one that is not
            named.
    """
    available = {str(kind.value) for kind in get_available_trackers()}
    for name in run.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"run.trackers holds {name!r}: choose from {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise UserError(f"run.trackers holds {name!r}, whose package is missing: pip install {name}")
    if others := ", ".join(run.tracker_options.keys() - {*run.trackers}):
        known = list(run.trackers)
        raise UserError(f"run.tracker_options names {others}, which run.trackers {known} does not: add it there")
    return ", ".join(run.trackers) or "none"


def open_tracker(name: str, project: str, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """Returns a tracker that is started.

    Args:
        folder: where trackers that write files write them. TensorBoard's are directly in it: it names a series after
            the folders above its files, so that a folder for the project would double the run's name.
        arguments: accelerate's `init_kwargs` of this tracker.
    """
    kind = LOGGER_TYPE_TO_CLASS[name]
    folders = [folder] if kind.requires_logging_directory else []
    tracker = kind("" if name == "tensorboard" else project, *folders, **arguments)
    tracker.start()
    return tracker


def choose_device(config: RuntimeConfig, has_cuda: bool) -> tuple[bool, bool]:
    """Returns whether to compute on a CUDA device, and whether to capture a step as a CUDA graph there: not with fp16,
    whose loss scaling reads gradients on the host.

    Raises:
        UserError: the settings need a CUDA device that is missing, or that can't do what they ask of it.
    """
    on_cuda = has_cuda and config.device != "cpu"
    can_capture = on_cuda and config.precision != "fp16"
    if config.device == "cuda" and not has_cuda:
        raise UserError("runtime.device is cuda, but torch sees no CUDA device: use cpu or auto")
    if config.precision == "fp16" and not on_cuda:
        raise UserError("runtime.precision is fp16, which takes a CUDA device: use bf16 or float32")
    if config.cuda_graph and not can_capture:
        raise UserError("runtime.cuda_graph is true, which takes a CUDA device and another precision than fp16")
    return on_cuda, can_capture and config.cuda_graph is not False
