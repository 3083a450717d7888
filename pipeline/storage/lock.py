"""One run folder, one writer: also across machines, as far as a file with an owner and a heartbeat can tell."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import psutil

from pipeline.errors import UserError

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

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._released = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        while not self._try_to_create():
            if owner := _living_owner(self._path):
                raise UserError(f"{folder}: is being written by {owner}: stop that one first, or use another run.name")
            self._remove_stale()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        self._released.set()
        self._path.unlink(missing_ok=True)

    def _try_to_create(self) -> bool:
        # Linked into place with its content, so that nobody ever reads an empty lock.
        draft = self._path.with_name(f".lock.{os.uname().nodename}.{os.getpid()}")
        own = psutil.Process()
        draft.write_text(json.dumps({"host": os.uname().nodename, "pid": own.pid, "started": own.create_time()}))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _remove_stale(self) -> None:
        # Renamed first: of two processes that find the same stale lock, only one gets to remove it.
        doomed = self._path.with_name(f".lock.stale.{os.uname().nodename}.{os.getpid()}")
        try:
            self._path.rename(doomed)
        except FileNotFoundError:
            return
        doomed.unlink()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:  # a file system that is away: training goes on, the lock may be taken for stale
                continue


def _living_owner(path: Path) -> str | None:
    """Who holds the lock, or None if it is gone or stale."""
    try:
        owner = json.loads(path.read_text())
        age_seconds = time.time() - path.stat().st_mtime
        name = f"process {owner['pid']} on {owner['host']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the unknown owner of {path} ({error}; delete that file if nothing writes there)"
    if owner["host"] == os.uname().nodename:
        try:
            process = psutil.Process(owner["pid"])
            same = process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE
            return name if same else None
        except psutil.NoSuchProcess:
            return None
    return f"{name} (heartbeat {age_seconds:.0f} s ago)" if age_seconds < STALE_SECONDS else None
