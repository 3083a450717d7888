"""Checks that end in every way there is, for `run_checks`; no torch, so that a process starts at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmarking.gpu_check.table import Check, Rows, row


@dataclass
class Context:
    """The one that is asked for by the name `Context` of such a module."""

    folder: Path
    arguments: list[str]


def free_memory() -> None:
    """There is nothing to free."""


def fine(context: Context) -> Rows:
    print("what a library prints")
    yield row("process", "its number", str(os.getpid()), True)


def fails_late(context: Context) -> Rows:
    yield row("first", "holds", "holds", True)
    raise ValueError("one line\nand another")


def is_killed(context: Context) -> Rows:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    yield row("never", "", "", True)


def hangs(context: Context) -> Rows:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield row("its child", "", str(child.pid), True)
    time.sleep(600)


def check(name: str, run: object, process: str = "same", seconds: float = 60) -> Check:
    return Check(name, "to hold", process, seconds, run)  # type: ignore[arg-type]


CHECKS = (
    check("one", fine),
    check("two", fine),
    check("late", fails_late),
    check("three", fine),
    check("hangs", hangs, seconds=1),
    check("killed", is_killed),
    check("four", fine, process="other"),
    check("too long", fine, process="other", seconds=1e6),
)
