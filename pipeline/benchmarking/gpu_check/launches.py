"""Checks of process groups and failures: each through a launcher, in processes of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from pipeline.benchmarking.gpu_check.context import Context, Walk
from pipeline.benchmarking.gpu_check.exact import EXACT
from pipeline.benchmarking.gpu_check.table import Row, Rows, row, within
from pipeline.errors import TrainingFailed
from pipeline.storage.checkpoint import committed, find
from pipeline.storage.run_folder import RunFolder

TIMEOUT_SECONDS = 20
"""How long ranks wait for a silent one, in the check of it."""
TRAJECTORY_STEPS, SCALING_STEPS = 4, 600
SCALING = 0.7
ON_PURPOSE = "this failure is part of the check"
"""What rank.py fails with when it is asked to."""
REASONS = re.compile(r"error: |Error: |Watchdog|exitcode", re.IGNORECASE)
_LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
_HERE = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1")
_ALONE = (sys.executable, "-m", "torch.distributed.run", *_HERE, "--module")
"""A process group of one, which accelerate's launcher does not make."""


@dataclass(frozen=True)
class Ended:
    """A job that is over."""

    code: int
    seconds: float
    stdout: str
    stderr: str

    def reason(self) -> str:
        """The first line of standard error that tells what went wrong; "" if none does."""
        told = (line.strip() for line in self.stderr.splitlines() if REASONS.search(line))
        return next((line[:160] for line in told if "CalledProcessError" not in line), "")


class Job:
    """A launcher and its processes."""

    def __init__(self, context: Context, command: Sequence[str]) -> None:
        self._files = [context.folder / f"job.{name}" for name in ("stdout", "stderr")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def rank(self, number: int) -> psutil.Process:
        for process in self.process.children(recursive=True):
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(number):
                    return process
        raise RuntimeError(f"there is no rank {number}")

    def wait(self) -> Ended:
        """Without a limit: whoever runs the check has one, and kills the job with it."""
        started = time.monotonic()
        code = self.process.wait()
        return Ended(code, time.monotonic() - started, *(path.read_text(errors="replace") for path in self._files))


def train(context: Context, world_size: int, settings: Mapping[str, Any]) -> Job:
    """`pipeline/train.py` on that many GPUs, started as users do."""
    file = f"launch/accelerate/{'gpu' if world_size == 1 else 'gpus'}.yaml"
    launcher = [*_LAUNCH, file, "--num_processes", str(world_size), "pipeline/train.py"]
    return Job(context, [*launcher, *context.command_line("wgan", {"run.sample_every": 10**6, **settings})])


def finished(job: Job) -> Ended:
    """Raises TrainingFailed if the job does not end well."""
    ended = job.wait()
    if ended.code:
        raise TrainingFailed(f"exit code {ended.code}: {ended.reason() or 'nothing said'}")
    return ended


def group_of_one(context: Context) -> Rows:
    """rank.py: DDP, batch norm over the ranks and their capture over NCCL, and Python objects over both groups."""
    ended = finished(Job(context, [*_ALONE, "pipeline.benchmarking.gpu_check.rank", *_rank_arguments(context, False)]))
    found = json.loads(ended.stdout.splitlines()[-1])
    yield within("group of one, captured", EXACT, found["difference"], "a step without DDP, float64,")
    yield row(
        "group of one, objects",
        "sent by NCCL and gloo",
        ", ".join(found["objects"]),
        found["objects"] == ["nccl", "gloo"],
    )


def group_of_one_fails(context: Context) -> Rows:
    job = Job(context, [*_ALONE, "pipeline.benchmarking.gpu_check.rank", *_rank_arguments(context, True)])
    ended = job.wait()
    yield _failure("group of one, failure after capture", ended, told=ON_PURPOSE in ended.stderr)


def _rank_arguments(context: Context, fail: bool) -> list[str]:
    return [str(context.folder), json.dumps(context.arguments), json.dumps(fail)]


def _failure(check: str, ended: Ended, told: bool) -> Row:
    """Of a job that had to fail."""
    seen = f"after {ended.seconds:.0f} s, exit code {ended.code}: {ended.reason()}"
    return row(check, "ends, not with 0, and says why", seen, bool(ended.code) and told, seconds=ended.seconds)


def trajectories(context: Context) -> Rows:
    ends = {}
    for world_size in _world_sizes((1, 2, 4)):
        settings = {"run.name": f"walk-{world_size}", "training.steps": TRAJECTORY_STEPS}
        settings |= {"runtime.precision": "float64", "runtime.cuda_graph": world_size > 1}
        finished(train(context, world_size, settings))
        ends[world_size] = Walk(torch.zeros(1), {}, find(_folder(context, settings)).tensors())
        if world_size > 1:
            difference = ends[world_size].difference(ends[1])
            yield within(f"{world_size} GPUs, captured, float64", EXACT, difference, "one GPU's eager trajectory")


def scaling(context: Context) -> Rows:
    """64 images a GPU."""
    rates: dict[int, float] = {}
    for world_size in _world_sizes((1, 2, 4, 8)):
        settings = {"run.name": f"scaling-{world_size}", "training.batch_size": 64 * world_size}
        settings |= {"training.steps": SCALING_STEPS, "run.log_every": SCALING_STEPS // 3, "runtime.cuda_graph": True}
        finished(train(context, world_size, settings))
        lines = _folder(context, settings).metrics.read_text().splitlines()
        rates[world_size] = json.loads(lines[-1])["images_per_second"]
        if world_size > 1:
            times, least = rates[world_size] / rates[1], SCALING * world_size
            seen = f"{rates[world_size]:,.0f} images/s, {times:.2f} times"
            expected = f"at least {least:.1f} times one GPU's images/s"
            yield row(f"{world_size} GPUs, scaling", expected, seen, times >= least, images_per_second=rates)


def lost_rank(context: Context, number: signal.Signals) -> Rows:
    """The second of two ranks is killed or suspended: the job ends and says why, and goes on from its checkpoint."""
    if not _world_sizes((2,)):
        return
    settings = {"run.name": number.name.lower(), "run.checkpoint_every": 20, "run.log_every": 20}
    settings |= {"runtime.timeout_seconds": TIMEOUT_SECONDS, "runtime.cuda_graph": True}
    folder, job = _folder(context, settings), train(context, 2, settings)
    while not committed(folder):
        if job.process.poll() is not None:
            raise TrainingFailed(f"ended before its first checkpoint: {job.wait().reason()}")
        time.sleep(0.2)
    job.rank(1).send_signal(number)
    ended = job.wait()
    yield _failure(f"2 GPUs, {number.name} to a rank", ended, told=bool(ended.reason()))
    again = finished(train(context, 2, settings | {"training.steps": find(folder).step + 20}))
    seen = next((line for line in again.stderr.splitlines() if "going on from" in line), "a new start")
    yield row(f"2 GPUs, after {number.name}", "goes on from its checkpoint", seen, "going on from" in seen)


def _world_sizes(sizes: Sequence[int]) -> list[int]:
    """Those that this machine has GPUs for; none on one GPU."""
    count = torch.cuda.device_count()
    return [size for size in sizes if size <= count] if count > 1 else []


def _folder(context: Context, settings: Mapping[str, Any]) -> RunFolder:
    return RunFolder(context.config("wgan", settings).folder)
