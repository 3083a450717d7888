"""One writer for a run, and for a dataset that is being prepared, also where several machines share the file system.

A lock is a file that names its owner. Two mechanisms each cover what the other can't:

- The file gets its name by a hard link, which only one process can make, on any file system. It is complete by then:
  nobody ever reads a lock without an owner, not even after a power cut.
- The owner also holds the kernel's lock (flock) on it, which ends with the process. If the file was made on this
  machine that tells a dead owner from a living one, so a run that was killed can go on at once.

Whether one machine sees the kernel's locks of another depends on the file system. A file that another machine made is
therefore not taken over: the error says which file to delete by hand. One exception lets a job of Slurm go on by itself
after the loss of its node: Slurm starts a job again only when its start before has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pipeline.distributed.slurm import job_id, job_restarts
from pipeline.errors import UserError
from pipeline.storage.files import fsync, make_folder, temporary_beside
from pipeline.storage.run_folder import RunFolder


class LockHeld(Exception):
    """Another process holds a lock, or may hold it; the message names that process."""


class Lock:
    """An exclusive lock, held from construction until `release` or the end of the process.

    `on_wait` is called before waiting for a living owner to release the lock. Without it nothing waits, and a living
    owner raises LockHeld; so does, in any case, one of which nobody can tell whether it lives.
    """

    def __init__(self, path: Path, on_wait: Callable[[], None] | None = None) -> None:
        self._path = path
        make_folder(path.parent)
        draft = temporary_beside(path)
        draft.unlink(missing_ok=True)  # left by a killed process of the same number, as the first one in a container
        self._file = draft.open("w")
        try:
            owner = {"host": os.uname().nodename, "boot": _boot(), "pid": os.getpid()}
            json.dump(owner | {"job": job_id(), "restarts": job_restarts()}, self._file)
            self._file.flush()
            fsync(draft)
            with contextlib.suppress(OSError):  # on a file system without kernel locks the name alone counts
                fcntl.flock(self._file, fcntl.LOCK_EX)
            while not self._take(draft, on_wait):
                pass
        except BaseException:
            self._file.close()
            raise
        finally:
            draft.unlink(missing_ok=True)

    def release(self) -> None:
        """Removes the lock file, unless another process has made it anew."""
        if not self.lost():
            self._path.unlink(missing_ok=True)
        self._file.close()

    def lost(self) -> str | None:
        """Returns a message if another process has the lock, because somebody deleted this one's file; else None."""
        with contextlib.suppress(OSError):  # the file system is away, or nobody has taken the deleted lock
            if not _is_at(self._path, self._file):
                return f"{self._path} was taken over by another process, which writes here now"
        return None

    def _take(self, draft: Path, on_wait: Callable[[], None] | None) -> bool:
        """Tries to give the draft the lock's name. Returns False if the lock changed meanwhile: then try again."""
        with contextlib.suppress(FileExistsError):
            self._path.hardlink_to(draft)
            return True
        try:
            with self._path.open("r+") as file:
                owner, can_be_judged = _owner(file)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if on_wait is None:
                        raise LockHeld(owner) from None
                    on_wait()
                    fcntl.flock(file, fcntl.LOCK_EX)
                    return False
                if not can_be_judged:
                    raise LockHeld(f"{owner} (if that has ended, delete {self._path})")
                if not _is_at(self._path, file):  # its owner released it after it was opened here
                    return False
                draft.replace(self._path)  # the dead owner's kernel lock is held here: no other process does the same
                return True
        except FileNotFoundError:
            return False
        except (OSError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
            reason = f"the unknown owner of {self._path} ({error}; delete that file if nothing writes there)"
            raise LockHeld(reason) from None


def lock_run(run: RunFolder) -> Lock:
    """Takes the lock of a run, whose folder is made if necessary. Raises UserError, which names the process, if another
    one holds it, or if there can't be such a folder."""
    try:
        make_folder(run.path)
    except OSError as error:
        reason = f"{run.path} can't be made ({error.strerror})"
        raise UserError(f"run.root is {run.path.parent}: {reason}, choose another") from None
    try:
        return Lock(run.lock)
    except LockHeld as holder:
        reason = f"is being written by {holder}: stop that one first, or use another run.name"
        raise UserError(f"{run.path}: {reason}") from None


def _owner(file: TextIO) -> tuple[str, bool]:
    """Returns the name of a lock's owner, and whether it has ended if it does not hold the kernel's lock: one of this
    machine has, and one of an earlier start of this Slurm job."""
    owner = json.load(file)
    # The host's name outlives a restart; the boot is common to the machine's containers, whose names differ.
    is_of_this_machine = owner["host"] == os.uname().nodename or (owner.get("boot") or "none") == _boot()
    is_earlier_start = owner.get("job") == job_id() is not None and owner["restarts"] < job_restarts()
    return f"process {int(owner['pid'])} on {owner['host']}", is_of_this_machine or is_earlier_start


def _boot() -> str | None:
    """Returns Linux's identifier of the time since the machine was started; None elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _is_at(path: Path, file: TextIO) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
