from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage.lock import Lock, lock_run
from pipeline.storage.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.lock import lock_run
from pipeline.storage.run_folder import RunFolder
lock = lock_run(RunFolder(Path(sys.argv[1])))
print('held', flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_killed_one_is_replaced_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is being written by process {holder.pid} on {os.uname().nodename}"):
        lock_run(RunFolder(tmp_path))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    lock = lock_run(RunFolder(tmp_path))
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_another_machines_lock_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "boot": "another", "pid": 1}))
    with pytest.raises(UserError, match=rf"process 1 on elsewhere \(if that has ended, delete {path}\): stop that"):
        lock_run(RunFolder(tmp_path))
    path.unlink()
    lock_run(RunFolder(tmp_path)).release()


@pytest.mark.parametrize(("job", "restarts", "is_taken"), [("7", 0, True), ("7", 1, False), ("8", 0, False)])
def test_a_job_that_slurm_starts_again_on_another_node_goes_on(
    job: str, restarts: int, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But neither beside its own processes nor over another job's."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "boot": "another", "pid": 1, "job": job, "restarts": restarts}))
    if is_taken:
        lock_run(RunFolder(tmp_path)).release()
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(UserError, match="process 1 on elsewhere"):
            lock_run(RunFolder(tmp_path))


@pytest.mark.parametrize("changed", ["host", "boot"])
def test_a_dead_owner_in_a_container_or_before_a_restart_is_replaced(changed: str, tmp_path: Path) -> None:
    lock = lock_run(RunFolder(tmp_path))
    owner = json.loads((tmp_path / ".lock").read_text())
    lock.release()
    (tmp_path / ".lock").write_text(json.dumps(owner | {changed: "another"}))
    lock_run(RunFolder(tmp_path)).release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_run_roots(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=rf"run.root is {tmp_path}/file: .*file/run can't be made \(Not a directory\), c"
    ):
        lock_run(RunFolder(tmp_path / "file/run"))


def test_a_lock_of_an_earlier_version_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 5, "started": 1.0}))
    lock_run(RunFolder(tmp_path)).release()


def test_of_many_that_meet_a_dead_owner_one_gets_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = "import sys; from pathlib import Path; from pipeline.storage.lock import Lock, LockHeld\n"
    program += "try: lock = Lock(Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()\n"
    program += "except LockHeld: print('refused', flush=True)"
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 5}))
    command = [sys.executable, "-c", program, str(path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:
        process.communicate()
    assert sorted(answers) == ["refused\n"] * 3 + ["taken\n"]


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    waits, ended, first = threading.Event(), threading.Event(), Lock(tmp_path / "lock")

    def second() -> None:
        Lock(tmp_path / "lock", on_wait=waits.set).release()
        ended.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert waits.wait(60)
    assert not ended.is_set()
    first.release()
    thread.join(60)
    assert ended.is_set()
    assert not list(tmp_path.iterdir())


def test_a_deleted_lock_that_another_takes_is_lost(tmp_path: Path) -> None:
    first = Lock(tmp_path / "lock")
    (tmp_path / "lock").unlink()
    assert first.lost() is None
    second = Lock(tmp_path / "lock")
    assert first.lost() == f"{tmp_path / 'lock'} was taken over by another process, which writes here now"
    first.release()
    assert second.lost() is None
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"held"',
        '{"host": "elsewhere"}',
        '{"host": "HERE", "pid": "me"}',
        '{"host": "HERE", "pid": Infinity}',
        "\xff",
    ],
)
def test_a_damaged_lock_is_not_taken_for_free(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(content.replace("HERE", os.uname().nodename).encode("latin-1"))
    with pytest.raises(UserError, match="delete that file if nothing writes there"):
        lock_run(RunFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_zombie_does_not_hold_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        lock_run(RunFolder(tmp_path))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not waited for
    lock_run(RunFolder(tmp_path)).release()
    child.stdout.close()
    child.wait()
