"""Requests to stop: a signal to any rank, or a file that appears. All ranks stop after the same step."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.collectives import Ranks
from pipeline.distributed.launcher import launch_arguments, parent_command, stop_file

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE_SECONDS = 1.0
"""The time between two looks for the stop file, which may be on a busy shared file system."""
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
"""Options of Linux's prctl: the signal that a process gets when its parent dies."""


class StopRequest:
    """The handler of STOP_SIGNALS in this process, and what the ranks agree on after one.

    A second SIGINT raises KeyboardInterrupt; one that comes while the process waits in a collective ends it
    (`run_program`). A thread beside the main one cannot handle signals, so there the stop file alone counts.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        """The ranks that have to agree; set after they have met."""
        self._requested = self._interrupted = False
        self._file, self._looked = stop_file(), 0.0
        self._pending: tuple[Any, Tensor] | None = None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)
        _end_with_launcher()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._requested = True

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop; other ranks may not know yet."""
        if self._file is not None and time.monotonic() > self._looked + STOP_FILE_SECONDS:
            self._looked = time.monotonic()
            self._requested = self._requested or self._file.exists()
        return self._requested

    def known(self) -> bool:
        """Returns whether this rank was asked to stop or has learned that another one was. Does not wait for other
        ranks, so their answers may differ: for long work of one rank between two collectives."""
        if (store := self.ranks.store) is None:
            return self.requested
        if self.requested:
            store.set("stop", "")
        return bool(store.check(["stop"]))

    def agreed(self) -> bool:
        """Returns whether any rank had been asked to stop at the previous call; the same on every rank.

        The answer is one call late so that no rank waits for the slowest one: the sum of this call's flags travels
        while the next step is computed.
        """
        if self.ranks.world_size == 1:
            return self.requested
        agreed = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = bool(flag)
        flag = torch.tensor(int(self.requested))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.ranks.host_group, async_op=True)
        self._pending = (work, flag)
        return agreed


@contextlib.contextmanager
def restoring_signals() -> Iterator[None]:
    """Restores, at the end of the block, what a StopRequest changes: the handlers and the signal at the parent's
    death."""
    prctl, number_at_death = _prctl(), ctypes.c_int()
    prctl(PR_GET_PDEATHSIG, ctypes.byref(number_at_death))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        prctl(PR_SET_PDEATHSIG, number_at_death.value)
        if threading.current_thread() is threading.main_thread():  # no other thread could have changed them
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _end_with_launcher() -> None:
    """Has Linux send this process SIGTERM when its launcher dies. With one process `accelerate launch` forwards no
    signal, and a launcher that is killed leaves its ranks behind: they would train on and hold the run's lock."""
    names = {Path(argument).name for argument in parent_command()}
    if launch_arguments() is not None or names & {"torchrun", "torch.distributed.run"}:
        _prctl()(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl() -> Callable[..., object]:
    """Returns Linux's prctl; on other systems a function that does nothing."""
    prctl: Callable[..., object] = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)
    return prctl
