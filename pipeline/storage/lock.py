"""One run folder, one writer: also across machines, as far as a file with an owner and a heartbeat can tell.

filelock's SoftFileLease comes near, but takes a zombie for alive, waits out a dead machine's heartbeat again in each
contender, and takes over a lock that it can't read after two seconds: here such a one is a person's to judge.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import psutil

from pipeline.errors import UserError
from pipeline.storage.files import fsync, make_folder, temporary_beside
from pipeline.storage.run_folder import RunFolder

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 60
"""A heartbeat this old is taken for a dead machine's. Well above what a shared file system delays."""


class RunLock:
    """Held from construction to `release` or the end of the process.

    The file names its owner (host, process) and its modification time is the heartbeat. On the owner's host the process
    table decides whether the owner lives, so a killed run can go on at once; from another host the heartbeat does.

    Raises:
        UserError: another process holds it; the message names it.
    """

    def __init__(self, run: RunFolder) -> None:
        self._path = run.lock
        self._released = threading.Event()
        make_folder(run.path)
        owner = {"host": os.uname().nodename, "pid": os.getpid(), "started": _start_of(os.getpid())}
        self._content = json.dumps(owner)
        draft = temporary_beside(run.lock)
        draft.write_text(self._content)
        fsync(draft)  # a power cut must not leave a lock that names nobody
        try:
            while not self._take(draft):
                # By the file's clock: that of this machine may be hours from the one that the heartbeat is told in.
                if holder := _living_owner(self._path, now=draft.stat().st_mtime):
                    reason = f"is being written by {holder}: stop that one first, or use another run.name"
                    raise UserError(f"{run.path}: {reason}")
                # Renamed first: of two processes that find the same stale lock, only one gets to remove it.
                with contextlib.suppress(FileNotFoundError):
                    self._path.rename(f"{draft}.stale").unlink()
        finally:
            draft.unlink()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if not self.lost():
            self._path.unlink(missing_ok=True)

    def lost(self) -> str | None:
        """In words, that another process has it: this one, or its file system, stood still for too long."""
        try:
            taken = self._path.read_text() != self._content
        except (OSError, ValueError):  # a person may have deleted it
            return None
        return f"{self._path} was taken over by another process, which writes this run now" if taken else None

    def _take(self, draft: Path) -> bool:
        """Links the lock into place with its content, so that nobody ever reads an empty one."""
        try:
            self._path.hardlink_to(draft)
        except FileExistsError:
            return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if not self.lost():
                    os.utime(self._path)
            except OSError:  # a file system that is away: training goes on, the lock may be taken for stale
                continue


def _living_owner(path: Path, now: float) -> str | None:
    """Who holds the lock, or None if it is gone or stale."""
    try:
        owner = json.loads(path.read_text())
        host, pid, started = str(owner["host"]), int(owner["pid"]), owner["started"]
        name, age_seconds = f"process {pid} on {host}", now - path.stat().st_mtime
        if host == os.uname().nodename:
            process = psutil.Process(pid)
            # A number is an earlier version's.
            same = started == _start_of(pid) if isinstance(started, str) else float(started) == process.create_time()
            return name if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, psutil.Error) as error:
        return f"the unknown owner of {path} ({error}; delete that file if nothing writes there)"
    return f"{name} (heartbeat {age_seconds:.0f} s ago)" if age_seconds < STALE_SECONDS else None


def _start_of(pid: int) -> str:
    """When a process began, in ticks since which boot: not by the clock, which may be set while the process lives."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]} of {boot}"
