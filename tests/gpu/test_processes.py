"""Process groups and failures, each through a launcher in processes of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest
import torch

from pipeline.storage.checkpoint import committed, find
from pipeline.storage.run_folder import RunFolder
from tests.gpu.one_rank import ON_PURPOSE
from tests.gpu.walks import Bench, Walk
from tests.jobs import ROOT

pytestmark = [pytest.mark.gpu(seconds=60), pytest.mark.filterwarnings("default")]
LIMIT_SECONDS = 120
TIMEOUT_SECONDS = 20
"""How long ranks wait for a silent one, in the test of it."""
SCALING_STEPS = 600
Record = Callable[[str, object], None]
ONE_RANK = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1")
"""A process group of one, which accelerate's launcher does not make."""


@contextmanager
def job(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Yields a launcher, which is killed with all its processes if it is still there at the end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    tree = psutil.Process(process.pid)
    try:
        yield process
    finally:
        with suppress(psutil.Error):
            # A launcher's ranks are in sessions of their own: each is killed by itself.
            for each in [*tree.children(recursive=True), tree]:
                each.kill()


def train(bench: Bench, world_size: int, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the command of `pipeline/train.py` on that many GPUs, started as users do."""
    file = f"launch/accelerate/{'gpu' if world_size == 1 else 'gpus'}.yaml"
    launcher = ("accelerate.commands.launch", "--config_file", file, "--num_processes", str(world_size))
    arguments = bench.command_line("wgan", {"run.sample_every": 10**6, **settings})
    return (*launcher, "--main_process_port", "0", "pipeline/train.py", *arguments)


def finish(*command: str) -> str:
    """Runs a job to its end, which must be a good one; returns its standard error."""
    with job(*command) as process:
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors[-4000:]
    return errors


def folder_of(bench: Bench, settings: Mapping[str, Any]) -> RunFolder:
    return RunFolder(bench.config("wgan", settings).folder)


def needs_gpus(count: int) -> None:
    if (seen := torch.cuda.device_count()) < count:
        pytest.skip(f"needs {count} GPUs, here is {seen}")


def one_rank(bench: Bench, *, fail: bool) -> tuple[int, str, str]:
    arguments = str(bench.folder), json.dumps(bench.arguments), json.dumps(fail)
    with job(*ONE_RANK, "--module", "tests.gpu.one_rank", *arguments) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, output, errors


def test_a_group_of_one_takes_the_same_steps(bench: Bench, record_property: Record) -> None:
    """DDP, batch norm over the ranks and their capture over NCCL, and Python objects over both groups."""
    code, output, errors = one_rank(bench, fail=False)
    assert code == 0, errors[-4000:]
    seen = json.loads(output.splitlines()[-1])
    record_property("difference", seen["difference"])
    assert seen["difference"] <= 1e-9
    assert seen["objects"] == ["nccl", "gloo"]


def test_a_group_that_fails_after_a_capture_ends(bench: Bench) -> None:
    code, _, errors = one_rank(bench, fail=True)
    assert code != 0
    assert ON_PURPOSE in errors


@pytest.mark.gpu(seconds=150)
def test_several_gpus_walk_the_trajectory_of_one(bench: Bench, record_property: Record) -> None:
    needs_gpus(2)
    ends = {}
    for world_size in (size for size in (1, 2, 4) if size <= torch.cuda.device_count()):
        settings = {"run.name": f"walk-{world_size}", "training.steps": 4}
        settings |= {"runtime.precision": "float64", "runtime.cuda_graph": world_size > 1}
        finish(*train(bench, world_size, settings))
        ends[world_size] = Walk(torch.zeros(1), find(folder_of(bench, settings)).tensors())
        record_property(f"{world_size} GPUs", difference := ends[world_size].difference(ends[1]))
        assert difference <= 1e-9


@pytest.mark.gpu(seconds=200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_lost_rank_ends_the_job_which_goes_on(bench: Bench, number: signal.Signals, record_property: Record) -> None:
    """The second of two ranks is killed or suspended."""
    needs_gpus(2)
    settings = {"run.name": number.name.lower(), "run.checkpoint_every": 20, "run.log_every": 20}
    settings |= {"runtime.timeout_seconds": TIMEOUT_SECONDS, "runtime.cuda_graph": True}
    folder = folder_of(bench, settings)
    with job(*train(bench, 2, settings)) as process:
        while not committed(folder):
            assert process.poll() is None, process.communicate()[1][-4000:]
            time.sleep(0.2)
        ranks = psutil.Process(process.pid).children(recursive=True)
        next(each for each in ranks if each.environ().get("RANK") == "1").send_signal(number)
        started = time.monotonic()
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    record_property("seconds to the end", time.monotonic() - started)
    assert process.returncode != 0
    assert "error" in errors.lower()
    again = finish(*train(bench, 2, settings | {"training.steps": find(folder).step + 20}))
    assert "going on from" in again


@pytest.mark.gpu(seconds=160)
def test_scaling(bench: Bench, record_property: Record) -> None:
    """64 images a GPU: figures, no limits."""
    needs_gpus(2)
    for world_size in (size for size in (1, 2, 4, 8) if size <= torch.cuda.device_count()):
        settings = {"run.name": f"scaling-{world_size}", "training.batch_size": 64 * world_size}
        settings |= {"training.steps": SCALING_STEPS, "run.log_every": SCALING_STEPS // 3, "runtime.cuda_graph": True}
        finish(*train(bench, world_size, settings))
        lines = folder_of(bench, settings).metrics.read_text().splitlines()
        record_property(f"images/s on {world_size} GPUs", json.loads(lines[-1])["images_per_second"])
