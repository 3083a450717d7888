"""How ranks use the cores of a machine. Real processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RuntimeConfig
from pipeline.distributed.cpu import CROWDED, PERIOD_SECONDS, seconds_waited_for_cores, sharing_the_cores
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from tests.jobs import ROOT, launch, restoring_process

CORES = sorted(os.sched_getaffinity(0))


def shares(folder: Path, num_processes: int) -> list[dict[str, Any]]:
    result = launch(ROOT / "tests/distributed/cores.py", [str(folder)], num_processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="takes two cores")
def test_each_rank_has_cores_of_its_own(tmp_path: Path) -> None:
    first, second = shares(tmp_path, 2)
    assert first["cores"] + second["cores"] == CORES
    assert first["threads"] == second["threads"] == len(CORES) // 2


def test_more_ranks_than_cores_share_all_of_them(tmp_path: Path) -> None:
    count = len(CORES) + 1
    if count > 8:
        pytest.skip("takes a process for each core and one more")
    assert shares(tmp_path, count) == [{"cores": CORES, "threads": 1, "subnormals": 0}] * count


def test_a_single_process_has_them_all_and_no_thread_keeps_subnormal_numbers(tmp_path: Path) -> None:
    assert shares(tmp_path, 1) == [{"cores": CORES, "threads": len(CORES), "subnormals": 0}]


def test_the_watch_over_the_cores_outlives_a_trial_and_ends_with_the_process() -> None:
    """A worker of a study resets what holds its graphs behind each trial."""

    def watches() -> int:
        return [thread.name for thread in threading.enumerate()].count("spinning")

    with restoring_process():
        runtime = Runtime(RuntimeConfig(threads=2))
        runtime.before_close.close()
        assert watches() == 1
        runtime.close()
        assert watches() == 0
        runtime = Runtime(RuntimeConfig(threads=1))
        assert watches() == 0
        runtime.close()


SPINNING = """
import time
import torch
from pipeline.distributed.cpu import sleeping_team

def seconds_spun():
    torch.ones(2**22).add(1)  # by two threads; one of them then waits for the next such work
    before = time.process_time()
    time.sleep(0.4)
    return time.process_time() - before

torch.set_num_threads(2)
print(seconds_spun())
with sleeping_team():
    time.sleep(0.2)
    print(seconds_spun())
time.sleep(0.2)
print(seconds_spun())
"""


@pytest.mark.slow
def test_threads_that_wait_for_work_sleep_while_there_is_a_sleeping_team() -> None:
    """Told to spin for minutes, a thread of torch's uses its core while the program sleeps."""
    result = subprocess.run(
        [sys.executable, "-c", SPINNING],
        env=os.environ | {"PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "30000000000", "OMP_WAIT_POLICY": "active"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    alone, beside, alone_again = map(float, result.stdout.split())
    assert beside < min(alone, alone_again) / 5


def test_the_team_comes_when_threads_queue_for_a_core_and_goes_when_they_do_not() -> None:
    """Two threads that compute are bound to one core, and then end."""
    threads, over, data = Path("/proc/self/task"), threading.Event(), bytes(2**24)

    def compute() -> None:
        os.sched_setaffinity(0, CORES[:1])
        while not over.is_set():
            hashlib.sha256(data)  # without the interpreter's lock

    def wait_for(team: bool) -> None:
        deadline = time.monotonic() + 30
        while (len(list(threads.iterdir())) > before + (os.cpu_count() or 1)) != team:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    others = set(threading.enumerate())
    with sharing_the_cores(), ThreadPoolExecutor(2) as pool:
        before = len(list(threads.iterdir())) + 2
        waited = seconds_waited_for_cores()
        computing = [pool.submit(compute) for _ in range(2)]
        try:
            wait_for(team=True)
            assert seconds_waited_for_cores() - waited > CROWDED * PERIOD_SECONDS
        finally:
            over.set()
        for each in computing:
            each.result()
        wait_for(team=False)
    assert set(threading.enumerate()) <= others


@pytest.mark.skipif(len(CORES) < 2, reason="takes two cores")
def test_a_runtime_that_cannot_be_had_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setenv("WORLD_SIZE", "2")  # without the rest of what a launcher tells
    with restoring_process(), pytest.raises(UserError, match="start with a launcher") as held:
        Runtime(RuntimeConfig(device="cpu", threads=2))
    assert held.tb  # as a notebook holds the last error's frames, and with them what they hold
    assert set(threading.enumerate()) <= before
