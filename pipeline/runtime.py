"""Processes, devices and signals. The only module that reads the environment, rank or world size.

Exit codes of every entry: 0 done; 1 a bug or a lost rank; 2 a mistake in what the user gave; 3 the training diverged or
can't be saved; 75 stopped on request after saving, launch again to go on (EX_TEMPFAIL).

A request to stop is one of STOP_SIGNALS to any rank, or that the file which the environment variable PIPELINE_STOP_FILE
names comes into being. A program that ends with code 75 removes the file: `accelerate launch` turns every code into 1,
and a batch script must know whether to queue the job again.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from tqdm import tqdm

from pipeline.config import RuntimeConfig, UserError

EXIT_USER_ERROR, EXIT_FAILED, EXIT_PREEMPTED = 2, 3, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COMMENT_SECONDS = 10
"""Least time between two updates of a Slurm job's comment."""
T = TypeVar("T")


class LocalError(UserError):
    """An error that perhaps only this rank has met, like a damaged shard of its own: whichever rank raises it tells."""


class TrainingFailed(Exception):
    """The run can't go on: it diverged, or its state can't be saved. The last good checkpoint is kept."""


class Preempted(Exception):
    """The run was asked to stop and every rank knows."""


class Runtime:
    """One rank's view of the job: devices, collectives, signals.

    Raises:
        UserError: no CUDA device where one was asked for, or the launcher started another number of processes than
            it was told to.
    """

    def __init__(self, config: RuntimeConfig, *, trackers: list[str] | None = None, folder: Path | None = None) -> None:
        self.started = time.monotonic()
        self._signals: list[int] = []
        self._stop_file = _stop_file()
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("runtime.device is cuda, but torch sees no CUDA device: use cpu or auto")
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        asked = _processes_asked_for()
        if asked > 1 and asked != _environment_int("WORLD_SIZE", 1):
            raise UserError(
                f"the launcher was told --num_processes {asked} but started {_environment_int('WORLD_SIZE', 1)}: "
                "add --multi_gpu (on CPUs too), or use a file of launch/accelerate/"
            )
        if on_cpu:
            torch.set_num_threads(config.threads or _threads_per_rank())
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            log_with=list(trackers or []) or None,
            project_config=ProjectConfiguration(logging_dir=str(folder / "tensorboard")) if folder else None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_seconds)),
            ],
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        if self.world_size != _environment_int("WORLD_SIZE", 1):
            raise UserError(
                f"WORLD_SIZE is {_environment_int('WORLD_SIZE', 1)} but accelerate runs {self.world_size} process(es): "
                "start with a file of launch/accelerate/"
            )
        # Bit-exact resume needs the same kernels every time.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        self._control: dist.ProcessGroup | None = None
        if self.world_size > 1:
            self._control = gloo_group()
        self._pending: tuple[Any, Tensor] | None = None
        self._comment: tuple[float, subprocess.Popen[bytes]] | None = None

    # -- signals -------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._signals:
            raise KeyboardInterrupt
        self._signals.append(number)

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was told to stop; other ranks may not know yet."""
        return bool(self._signals) or (self._stop_file is not None and self._stop_file.exists())

    def stop_known(self) -> bool:
        """Whether this rank was told to stop or has heard that another was. Waits for nobody; ranks may differ.

        For long work of one's own between two collectives, like rendering images for an evaluation.
        """
        if self._control is None:
            return self.stop_requested
        store = dist.distributed_c10d._get_default_store()
        if self.stop_requested:
            store.set("stop", "1")
            return True
        return bool(store.check(["stop"]))

    def stop_agreed(self) -> bool:
        """Whether any rank had been told to stop at the previous call; every rank gets the same answer.

        Pipelined by one call, so that nobody waits for the slowest rank between two steps.
        """
        if self._control is None:
            return self.stop_requested
        agreed = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = bool(flag)
        flag = torch.tensor(int(self.stop_requested))
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control, async_op=True), flag)
        return agreed

    # -- collectives ---------------------------------------------------------------------------------------------------

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Blocks until all ranks have called."""
        if self._control is None:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._control)
        return bool(value)

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main process; every rank returns its result, or raises its UserError."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise mean; a NaN or infinity on any rank is one in the result."""
        return self.accelerator.reduce(values, reduction="mean")  # type: ignore[no-any-return]

    def wrap(self, network: nn.Module) -> nn.Module:
        """Wraps for data parallelism (the module itself when there is one process)."""
        # Buffers are equal on all ranks by construction (SyncBatchNorm): broadcasting them each step is wasted time.
        names = [name for name, _ in network.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)  # type: ignore[no-untyped-call]
        wrapped: nn.Module = self.accelerator.prepare_model(network)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            # Its gradients are grouped anew after the first step, and the rounding of a sum over more than two ranks
            # depends on the grouping: without this a resumed run would leave the uninterrupted one's trajectory.
            wrapped.reducer._push_all_rebuilt_params()
            wrapped.reducer._rebuild_buckets()
        return wrapped

    def synchronise_batch_norm(self, network: nn.Module) -> None:
        """Makes every batch norm of `network` take its training statistics over all ranks, in place."""
        if self.world_size > 1:
            for module in network.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = SyncBatchNorm

    # -- what a person sees --------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        """One line on the main process's standard error, above the progress bar."""
        if self.is_main:
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def comment(self, text: str, *, last: bool = False) -> None:
        """Makes `text` the comment of the Slurm job, as `scontrol show job` shows it; nothing outside of Slurm.

        Nobody waits for it or hears of its failure: a site may forbid it. A text that comes sooner than COMMENT_SECONDS
        after another, or while that is still on its way, is dropped unless it is the `last`.
        """
        job, now = os.environ.get("SLURM_JOB_ID"), time.monotonic()
        if job is None or not self.is_main:
            return
        if self._comment is not None and not last:
            then, process = self._comment
            if process.poll() is None or now - then < COMMENT_SECONDS:
                return
        command = ["scontrol", "update", f"JobId={job}", f"Comment={text}"]
        with contextlib.suppress(OSError):
            nowhere = subprocess.DEVNULL
            self._comment = now, subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)

    def job_seconds_left(self) -> float | None:
        """What the Slurm job's time limit leaves; None outside of Slurm, without a limit, or where Slurm won't say."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
        try:
            left = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
        found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)  # or UNLIMITED, NOT_SET, INVALID
        if found is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    def environment(self) -> dict[str, Any]:
        """Versions and hardware, for the run's environment.json."""
        packages = ("torch", "accelerate", "webdataset", "torchmetrics", "torch-fidelity", "numpy")
        return {
            "git_commit": _git_commit(),
            "python": sys.version.split()[0],
            "packages": {name: metadata.version(name) for name in packages},
            "world_size": self.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor_name(),
            "threads_per_rank": torch.get_num_threads(),
            "hostname": os.uname().nodename,
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }

    def close(self) -> None:
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of the global batch, on any device and backend.

    torch's own refuses CPU tensors. Equal slices on all ranks are assumed (contract 2).
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        count = images.numel() // images.shape[1] * dist.get_world_size()
        mean = collectives.all_reduce(images.sum((0, 2, 3)), "sum", _world()) / count
        centred = images - mean.view(1, -1, 1, 1)
        # Centred squares: the difference of two large sums would lose the float32 digits that tests compare.
        variance = collectives.all_reduce(centred.square().sum((0, 2, 3)), "sum", _world()) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale: Tensor = self.weight * torch.rsqrt(variance + self.eps)
        normalised: Tensor = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalised


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gloo_group() -> dist.ProcessGroup:
    """A process group of all ranks for CPU tensors, with collectives of its own beside the default group's."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def run_entry(main: Callable[[], int]) -> NoReturn:
    """Runs an entry's main and turns its outcome into an exit code and at most one line."""
    prefix = f"[rank {_environment_int('RANK', 0)}] " if _environment_int("WORLD_SIZE", 1) > 1 else ""
    try:
        code = main()
    except (UserError, TrainingFailed) as error:
        if _environment_int("RANK", 0) == 0 or isinstance(error, LocalError):
            print(f"{prefix if isinstance(error, LocalError) else ''}error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    except KeyboardInterrupt:
        print(f"{prefix}stopped at once by a second interrupt", file=sys.stderr)
        code = 130
    if code == EXIT_PREEMPTED and _environment_int("RANK", 0) == 0 and (path := _stop_file()) is not None:
        path.unlink(missing_ok=True)
    sys.exit(code)


def _stop_file() -> Path | None:
    path = os.environ.get("PIPELINE_STOP_FILE")
    return Path(path) if path else None


def _environment_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _threads_per_rank() -> int:
    return max(1, len(os.sched_getaffinity(0)) // _environment_int("LOCAL_WORLD_SIZE", 1))


def _processes_asked_for() -> int:
    """What `accelerate launch --num_processes` was given: with --cpu it starts one process whatever that says."""
    try:
        arguments = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):
        return 1
    # python .../accelerate launch, accelerate-launch or python -m accelerate.commands.launch
    program = " ".join(arguments[:4])
    if "accelerate" not in program or "launch" not in program:
        return 1
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = argument.replace("-", "_").partition("=")
        if name == "__num_processes":
            return int(value or following)
    return 1


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else 'CPU'}"
