"""What the launcher tells its processes, and what a program tells the launcher. Imports no torch: programs start here.

The only environment variables that the pipeline reads are named in this package.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from pipeline.compat import run_exit_functions
from pipeline.distributed.interrupt import on_interrupt
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_RANK_LOST,
    EXIT_USER_ERROR,
    LocalError,
    Preempted,
    RankLost,
    TrainingFailed,
    UserError,
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write, which does not tell its file."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""

EXIT_TERMINATED = 128 + signal.SIGTERM
"""As a shell counts it: before a Runtime was there to take the signal."""


def told(name: str, default: int) -> int:
    """A number that the launcher put into the environment (RANK, WORLD_SIZE, LOCAL_RANK, ...).

    Raises:
        UserError: it is none.
    """
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}, no number: unset it, a launcher sets its own")
    return int(value)


def stop_file() -> Path | None:
    """The file whose coming into being asks the run to stop, where PIPELINE_STOP_FILE names one."""
    path = os.environ.get("PIPELINE_STOP_FILE")
    return Path(path) if path else None


def announce(line: str) -> None:
    """Tells, on the first rank, what is about to happen, before the libraries are loaded that it takes."""
    if told("RANK", 0) == 0:
        print(line, file=sys.stderr, flush=True)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's main and turns its outcome into an exit code (pipeline/errors.py) and at most one line.

    After a stop that saved, the stop file is removed: `accelerate launch` turns every code into 1, and a batch script
    must know whether to queue the job again.
    """
    rank = code = world_size = 0
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    on_interrupt(interrupt)
    if os.getpid() == 1:  # a container's: the kernel drops signals to it that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        rank, world_size = told("RANK", 0), told("WORLD_SIZE", 1)
        _check_ranks()
        with _ending_at_second_interrupt():
            try:
                code = main() or 0
            finally:
                if world_size > 1:  # the launcher sends SIGTERM to who is not through yet when another rank has ended
                    for number in (signal.SIGTERM, signal.SIGUSR1):
                        signal.signal(number, lambda *_: None)
    except Preempted as stop:
        _say(str(stop), rank)
        code = EXIT_PREEMPTED
    except LocalError as error:
        _say(f"{f'[rank {rank}] ' if world_size > 1 else ''}error: {error}")
        code = EXIT_USER_ERROR
    except (UserError, TrainingFailed) as error:
        _say(f"error: {error}", rank)
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    except RankLost:
        code = EXIT_RANK_LOST
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = EXIT_FAILED
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        _say(f"error: {what}; nothing more was written")
        code = EXIT_FAILED
    except KeyboardInterrupt:  # before a Runtime was there to take it
        code = EXIT_INTERRUPTED
    except Exception:
        if not interrupts:  # what a package makes of an interrupt that met its import
            raise
        code = EXIT_INTERRUPTED
    if code == EXIT_PREEMPTED and rank == 0 and (path := stop_file()) is not None:
        path.unlink(missing_ok=True)
    if world_size > 1:
        # All is done and closed. A rank that took itself apart in the ordinary way was seen to die of SIGABRT now and
        # then, of a C++ thread that outlived its owner, and the launcher ended the job as failed.
        run_exit_functions()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    # The interpreter's end is no place for a traceback either; in a program that goes on, ^C stays as it is.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _check_ranks() -> None:
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if told(name, 0) >= told(limit, 1):
            text = f"the environment variable {name} is {told(name, 0)}, but {limit} is {told(limit, 1)}"
            raise LocalError(f"{text}: a launcher sets both, unset them for a process alone")


@contextlib.contextmanager
def _ending_at_second_interrupt() -> Iterator[None]:
    """A Python signal handler has to wait until the main thread comes out of a collective. This thread does not."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        interrupts = 0
        while received := os.read(reader, 64):
            interrupts += received.count(signal.SIGINT)
            if interrupts > 1:
                os.write(sys.stderr.fileno(), b"stopped at once by a second interrupt\n")
                os._exit(EXIT_INTERRUPTED)
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _say(line: str, rank: int = 0) -> None:
    """On the first rank, for a line that every rank has. Control characters, as a file's name may hold them, are
    written out: a terminal would obey them."""
    shown = "".join(each if each.isprintable() or each == "\n" else f"\\x{ord(each):02x}" for each in line)
    if rank == 0:
        print(shown, file=sys.stderr, flush=True)
    # torchrun, and so `accelerate launch` with several ranks, has a page of its own to say when a rank fails: what this
    # file holds comes last on it, and not "<NA>".
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = {"message": shown, "extraInfo": {"py_callstack": shown, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": text}))


def end_with_launcher() -> None:
    """Has the kernel send this process SIGTERM when its launcher dies: with one process `accelerate launch` hands on no
    signal, and one that is killed leaves its ranks behind, which would train on and hold the run's lock."""
    names = {Path(argument).name for argument in _parents_command()}
    if launch_arguments() is not None or names & {"torchrun", "torch.distributed.run"}:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch_arguments() -> list[str] | None:
    """The arguments of the `accelerate launch` that started this process; None if something else did."""
    arguments = _parents_command()
    for place, argument in enumerate(arguments, 1):
        name = Path(argument).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return arguments[place:]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and arguments[place : place + 1] == ["launch"]:
            return arguments[place + 1 :]
    return None


def _parents_command() -> list[str]:
    try:
        return psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):
        return []
