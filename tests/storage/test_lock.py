from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.storage.lock import STALE_SECONDS, RunLock
from pipeline.storage.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.lock import RunLock
from pipeline.storage.run_folder import RunFolder
lock = RunLock(RunFolder(Path(sys.argv[1])))
print('held', flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_killed_one_is_replaced_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is being written by process {holder.pid} on {os.uname().nodename}"):
        RunLock(RunFolder(tmp_path))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    lock = RunLock(RunFolder(tmp_path))
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_clock_that_was_set_frees_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's beginning in seconds is reckoned from the boot's, which moves with the clock."""
    lock, created = RunLock(RunFolder(tmp_path)), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 120)
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on"):
        RunLock(RunFolder(tmp_path))
    lock.release()


def test_another_hosts_lock_counts_until_its_heartbeat_stops(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    with pytest.raises(UserError, match=r"process 1 on elsewhere \(heartbeat 0 s ago\)"):
        RunLock(RunFolder(tmp_path))
    past = path.stat().st_mtime - STALE_SECONDS - 1
    os.utime(path, (past, past))
    RunLock(RunFolder(tmp_path)).release()


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_wrong_takes_no_lock(hours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + hours * 3600)
    with pytest.raises(UserError, match=r"process 1 on elsewhere \(heartbeat 0 s ago\)"):
        RunLock(RunFolder(tmp_path))


def test_a_process_number_that_was_given_out_again_does_not_hold_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "started": 1.0}))
    RunLock(RunFolder(tmp_path)).release()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"held"',
        '{"host": "elsewhere"}',
        '{"host": "HERE", "pid": "me", "started": 1.0}',
        '{"host": "HERE", "pid": -1, "started": 1.0}',
        '{"host": "HERE", "pid": 1, "started": null}',
        '{"host": "HERE", "pid": Infinity, "started": 1.0}',
        "\xff",
    ],
)
def test_a_damaged_lock_is_not_taken_for_free(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(content.replace("HERE", os.uname().nodename).encode("latin-1"))
    with pytest.raises(UserError, match="delete that file if nothing writes there"):
        RunLock(RunFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_zombie_does_not_hold_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    (tmp_path / ".lock").write_text(json.dumps({"host": os.uname().nodename, "pid": child.pid, "started": started}))
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        RunLock(RunFolder(tmp_path))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not waited for
    RunLock(RunFolder(tmp_path)).release()
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
