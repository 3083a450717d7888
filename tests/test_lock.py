from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage.lock import STALE_SECONDS, RunLock

HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print('held', flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_killed_one_is_replaced_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is being written by process {holder.pid} on {os.uname().nodename}"):
        RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_another_hosts_lock_counts_until_its_heartbeat_stops(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    with pytest.raises(UserError, match=r"process 1 on elsewhere \(heartbeat 0 s ago\)"):
        RunLock(tmp_path)
    past = path.stat().st_mtime - STALE_SECONDS - 1
    os.utime(path, (past, past))
    RunLock(tmp_path).release()


def test_a_process_number_that_was_given_out_again_does_not_hold_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "started": 1.0}))
    RunLock(tmp_path).release()


def test_a_damaged_lock_is_not_taken_for_free(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{")
    with pytest.raises(UserError, match="delete that file if nothing writes there"):
        RunLock(tmp_path)
