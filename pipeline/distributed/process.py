"""One process of a job: its device, its arithmetic, its ranks, and what it says to people."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.compat import leave_buffers_alone, settle_buckets, stop_timing
from pipeline.config import RuntimeConfig, captures_steps, check_device
from pipeline.distributed import accelerate_settings
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpu import give_back_freed_memory, use_cpu
from pipeline.distributed.launcher import told
from pipeline.distributed.rendezvous import join_process_group
from pipeline.distributed.slurm import JobComment
from pipeline.distributed.spinning import sharing_the_cores
from pipeline.distributed.stopping import StopRequest
from pipeline.errors import UserError


class Runtime:
    """This process as the programs see it.

    Raises:
        UserError: no CUDA device where one was asked for, or the launcher started another number of processes than it
            was told to.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.cores = sorted(os.sched_getaffinity(0))
        """Of this machine, for its ranks to share on a CPU."""
        self.stop = StopRequest()
        has_cuda = torch.cuda.is_available() and not (config.device == "auto" and accelerate_settings.asks_for_cpu())
        check_device(config, has_cuda)
        on_cpu = config.device == "cpu" or not has_cuda
        accelerate_settings.refuse_unfit()
        world_size = told("WORLD_SIZE", 1)
        self.before_close = contextlib.ExitStack()
        """What has to end before the process group does: graphs that hold its collectives."""
        if on_cpu:
            use_cpu(self.cores, config.threads)
        timeout = timedelta(seconds=config.timeout_seconds)
        several = world_size > 1
        self.ranks = self.stop.ranks = join_process_group("gloo" if on_cpu else "nccl", timeout) if several else Ranks()
        with accelerate_settings.hidden(several):
            self.accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
                kwargs_handlers=[
                    # A network's gradients in one collective. At 25 MiB, the default, torch makes a first one of 1 MiB.
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=26)
                ],
            )
        if self.accelerator.num_processes != world_size:
            raise UserError(
                f"WORLD_SIZE is {world_size} but accelerate runs {self.accelerator.num_processes} process(es): "
                "start with a file of launch/accelerate/"
            )
        self.device = torch.empty(0, device=self.accelerator.device).device
        """As tensors there name it: accelerate's `cpu:0` is not equal to their `cpu`, so `.to` would copy what is there
        already."""
        self.scaler: torch.amp.GradScaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)
        """Of losses; disabled unless the precision is fp16."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        # Bit-exact resume needs the same kernels every time.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        self.captures = captures_steps(config, has_cuda)
        self.capture_stream = torch.cuda.Stream() if self.captures else None  # type: ignore[no-untyped-call]
        """Where steps are captured: DDP is built, warmed up and captured on one stream."""
        self._comment = JobComment()
        for line in accelerate_settings.unused(config):
            self.say(line)
        self._watch = contextlib.ExitStack()
        if on_cpu and torch.get_num_threads() > 1:  # last: its thread would stay where what follows fails
            self._watch.enter_context(sharing_the_cores())

    def autocast(self) -> AbstractContextManager[None]:
        """What a wrapped network's forward pass runs under: the arithmetic of `runtime.precision`."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def wrap(self, network: nn.Module, *, data_parallel: bool = True) -> nn.Module:
        """The network with its forward pass under `autocast`, and with its gradients averaged over the ranks during the
        backward pass if `data_parallel` (and there are several)."""
        leave_buffers_alone(network)
        alone = not data_parallel or self.ranks.world_size == 1
        with on_stream(self.capture_stream):
            wrapped: nn.Module = self.accelerator.prepare_model(network, device_placement=False, evaluation_mode=alone)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            settle_buckets(wrapped)
            for weight in network.parameters():
                if weight.is_contiguous():  # one channel: channels-last or not is the same memory under other strides
                    weight.register_hook(partial(_with_strides, weight.stride()))  # type: ignore[no-untyped-call]
            stop_timing(wrapped)
        return wrapped

    def alone(self) -> Runtime:
        """This process as if it were the only one, to compare with."""
        single = copy.copy(self)
        single.ranks = Ranks()
        return single

    def __str__(self) -> str:
        """How many ranks on which device."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{self.ranks.world_size} rank{'s' * (self.ranks.world_size > 1)} on {name}"

    # -- what a person sees --------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        """One line on the main process's standard error, above the progress bar."""
        if self.ranks.is_main:
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def comment(self, text: str, *, last: bool = False) -> None:
        """Makes `text` the comment of the Slurm job, if there is one."""
        if self.ranks.is_main:
            self._comment.set(text, last=last)

    @contextlib.contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """A full or lost disk costs what was to be written, never the run: checkpoints decide when to give up."""
        try:
            yield
        except OSError as error:
            self.say(f"{what} not written: {error}")

    def close(self) -> None:
        self.before_close.close()
        self._watch.close()
        with self.tolerating("the trackers' last lines"):  # a tracker flushes to a disk that is full
            self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.device.type == "cpu":
            give_back_freed_memory()


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """DDP copies a gradient into its bucket under the parameter's strides, and warns where they differ."""
    return gradient.as_strided(gradient.shape, strides)


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Queues what follows behind the current stream's work, and what that does later behind this; None: nothing."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
