"""Processes, devices and signals. The only module that reads the environment, rank or world size.

Exit codes of every entry: 0 done; 1 a bug or a lost rank; 2 a mistake in what the user gave; 3 the training diverged or
can't be saved; 75 stopped on request after saving, launch again to go on (EX_TEMPFAIL); 130 stopped at once by a
second SIGINT.

A request to stop is one of STOP_SIGNALS to any rank, or that the file which the environment variable PIPELINE_STOP_FILE
names comes into being. A program that ends with code 75 removes the file: `accelerate launch` turns every code into 1,
and a batch script must know whether to queue the job again.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
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
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from pipeline.config import RuntimeConfig
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LocalError,
    TrainingFailed,
    UserError,
)
from pipeline.networks import BatchNorm, Statistics, update_moving_averages

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COMMENT_SECONDS = 10
"""Least time between two updates of a Slurm job's comment."""
STOP_FILE_SECONDS = 1.0
"""Between two looks for the stop file, which may lie on a busy shared file system."""
T = TypeVar("T")


class Runtime:
    """One rank's view of the job: devices, collectives, signals.

    Raises:
        UserError: no CUDA device where one was asked for, or the launcher started another number of processes than
            it was told to.
    """

    def __init__(self, config: RuntimeConfig, *, trackers: list[str] | None = None, folder: Path | None = None) -> None:
        self.started = time.monotonic()
        self.cores = sorted(os.sched_getaffinity(0))
        """Of this machine, for its ranks to share on a CPU."""
        self._signalled = False
        self._stop_file = _stop_file()
        self._looked = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        _exit_at_second_interrupt()
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("runtime.device is cuda, but torch sees no CUDA device: use cpu or auto")
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        if config.precision == "fp16" and on_cpu:
            raise UserError("runtime.precision is fp16, which takes a CUDA device: use bf16 or float32")
        if config.cuda_graph and (on_cpu or config.precision == "fp16"):
            raise UserError("runtime.cuda_graph is true, which takes a CUDA device and another precision than fp16")
        asked = _processes_asked_for()
        if asked > 1 and asked != _environment_int("WORLD_SIZE", 1):
            raise UserError(
                f"the launcher was told --num_processes {asked} but started {_environment_int('WORLD_SIZE', 1)}: "
                "add --multi_gpu (on CPUs too), or use a file of launch/accelerate/"
            )
        if on_cpu:
            # Saturated pixels have gradients below float32's normal range, each of which costs a CPU some 100 cycles: a
            # fifth of the quickstart's later steps. Threads inherit this from the one that makes them.
            torch.set_flush_denormal(True)
            torch.set_num_threads(config.threads or max(1, len(self.cores) // _environment_int("LOCAL_WORLD_SIZE", 1)))
            self.take_cores()
            _keep_freed_memory()
        if config.cuda_graph:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # its watchdog may not touch a stream under capture
        if _environment_int("WORLD_SIZE", 1) > 1:
            _join_process_group("gloo" if on_cpu else "nccl", timedelta(seconds=config.timeout_seconds))
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
            log_with=list(trackers or []) or None,
            project_config=ProjectConfiguration(logging_dir=str(folder / "tensorboard")) if folder else None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,
                    comm_hook=DDPCommunicationHookType.BF16
                    if config.compress_gradients
                    else DDPCommunicationHookType.NO,
                )
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
        self.scaler: torch.amp.GradScaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)
        """Of losses; disabled unless the precision is fp16."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
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
        self._signalled = True

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was told to stop; other ranks may not know yet."""
        if self._stop_file is not None and time.monotonic() > self._looked + STOP_FILE_SECONDS:
            self._looked = time.monotonic()
            self._signalled = self._signalled or self._stop_file.exists()
        return self._signalled

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
        """Runs `work` on the main process; every rank returns its result, or raises its UserError.

        A file that can't be read or written (OSError) becomes a UserError too: it names itself.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
            except OSError as error:
                outcome[1] = UserError(str(error))
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise mean; a NaN or infinity on any rank is one in the result."""
        return self.sum_over_ranks(values) / self.world_size

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, network: nn.Module, *, parallel: bool) -> nn.Module:
        """Puts the forward pass under autocast where the precision asks for it, and wraps for data parallelism if
        `parallel` (the module itself comes back when not, or when there is one process)."""
        # Buffers are equal on all ranks by construction (SyncBatchNorm): broadcasting them each step is wasted time.
        names = [name for name, _ in network.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)  # type: ignore[no-untyped-call]
        if self.device.type == "cuda":  # a graph that holds DDP's collectives wants it built off the default stream
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                return self._prepare(network, parallel)
        return self._prepare(network, parallel)

    def _prepare(self, network: nn.Module, parallel: bool) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(
            network, evaluation_mode=not parallel or self.world_size == 1
        )
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
                if type(module) is BatchNorm:
                    module.__class__ = SyncBatchNorm

    def take_cores(self) -> None:
        """Binds the calling thread to this rank's share of the cores, where there is one for each.

        Or the threads that move a rank's messages wait for a core on which another rank computes.
        """
        ranks, rank = _environment_int("LOCAL_WORLD_SIZE", 1), _environment_int("LOCAL_RANK", 0)
        if ranks <= len(self.cores):
            first, last = (len(self.cores) * number // ranks for number in (rank, rank + 1))
            os.sched_setaffinity(0, self.cores[first:last])

    def alone(self) -> Runtime:
        """This rank as if it were the only one, to compare with."""
        single = copy.copy(self)
        single.rank, single.world_size, single.is_main, single._control = 0, 1, True, None
        return single

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
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{len(self.cores)} x {_processor_name()}",
            "threads_per_rank": torch.get_num_threads(),
            "hostname": os.uname().nodename,
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }

    def close(self) -> None:
        try:
            self.accelerator.end_training()
        except OSError as error:  # a tracker flushes to a disk that is full
            self.say(f"trackers not written to the end: {error}")
        if dist.is_initialized():
            dist.destroy_process_group()


class SyncBatchNorm(BatchNorm):
    """Batch norm whose training statistics are those of the global batch, on any device and backend.

    torch's own refuses CPU tensors. Equal slices on all ranks are assumed (contract 2). Several batches share one
    collective.
    """

    def forward(self, batches: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        if not self.training:
            return super().forward(batches)
        batches = [images.to(self.weight.dtype) for images in batches]  # autocast's are of half precision
        statistics = zip(*_statistics_of_all_ranks(batches), strict=True)
        return [self._normalise(images, *found) for images, found in zip(batches, statistics, strict=True)]

    def _normalise(self, images: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        n, c, h, w = images.shape
        count = n * h * w * dist.get_world_size()
        update_moving_averages(self, Statistics(mean, variance, count))
        # Channels-last images are rows of w * c numbers already: long enough for a CPU's vectors, unlike c.
        rows = images.permute(0, 2, 3, 1).reshape(n * h, w * c)
        rows = _Normalise.apply(rows, self.weight, self.bias, mean, torch.rsqrt(variance + self.eps), count)
        normalised: Tensor = rows.view(n, h, w, c).permute(0, 3, 1, 2)
        return normalised


def _statistics_of_all_ranks(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (batches, channels) each, from the ranks' own (Chan et al. 1983) in one collective."""
    own = torch.stack(
        [torch.cat(torch.batch_norm_update_stats(images.detach(), None, None, 0.0)) for images in batches]
    )
    ranks = own.new_zeros(dist.get_world_size(), *own.shape)
    ranks[dist.get_rank()] = own
    means, variances = _sum_over_ranks(ranks).chunk(2, dim=2)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class _Normalise(torch.autograd.Function):
    """(x - mean) * inverse * weight + bias for rows (m, w * channels). `mean` and `inverse`, one by the standard
    deviation, are those of `count` values of a channel over all ranks' rows, and the gradient knows that."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, mean, inverse)
        ctx.count = count
        w, scale = rows.shape[1] // len(weight), weight * inverse
        return torch.addcmul((bias - mean * scale).repeat(w), rows, scale.repeat(w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse = ctx.saved_tensors
        w = rows.shape[1] // len(weight)
        for_bias = upstream.sum(0).view(w, -1).sum(0)
        for_weight = ((upstream * rows).sum(0).view(w, -1).sum(0) - mean * for_bias) * inverse
        bias_mean, weight_mean = _sum_over_ranks(torch.stack([for_bias, for_weight])) / ctx.count
        # scale * (upstream - mean(upstream) - normalised * mean(upstream * normalised))
        scale = weight * inverse
        slope = -scale * inverse * weight_mean
        shift = -scale * bias_mean - slope * mean
        downstream = torch.addcmul(shift.repeat(w), rows, slope.repeat(w)).addcmul_(upstream, scale.repeat(w))
        return downstream, for_weight, for_bias, None, None, None


def _sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def _keep_freed_memory() -> None:
    """glibc gives large freed blocks back to the system, and the next tensor faults their pages in again: a sixth of a
    step of small networks. Kept, they are used again at once."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 * 2**20)  # its most
        mallopt(trim_threshold, 2**31 - 1)


def _exit_at_second_interrupt() -> None:
    """A Python signal handler has to wait until the main thread comes out of a collective. This thread does not."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(reader, 64).count(signal.SIGINT)
        os.write(sys.stderr.fileno(), b"stopped at once by a second interrupt\n")
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def _join_process_group(backend: str, timeout: timedelta) -> None:
    """The launcher's key-value store outlives the ranks that it restarts (`--max_restarts`): without a prefix of its
    own, an attempt would read the addresses of dead ranks there."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    attempt = PrefixStore(f"attempt {_environment_int('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=timeout, store=attempt, rank=rank, world_size=world_size)


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
    except KeyboardInterrupt:  # before a Runtime was there to take it
        code = EXIT_INTERRUPTED
    if code == EXIT_PREEMPTED and _environment_int("RANK", 0) == 0 and (path := _stop_file()) is not None:
        path.unlink(missing_ok=True)
    sys.exit(code)


def _stop_file() -> Path | None:
    path = os.environ.get("PIPELINE_STOP_FILE")
    return Path(path) if path else None


def _environment_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


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
    return names[0] if names else "CPU"
