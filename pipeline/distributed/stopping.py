"""Requests to stop: a signal to any rank, or a file that comes into being. All ranks agree on the step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.compat import job_store
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.launcher import end_with_launcher, stop_file

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE_SECONDS = 1.0
"""Between two looks for the stop file, which may lie on a busy shared file system."""


class StopRequest:
    """Takes over STOP_SIGNALS of this process. A second SIGINT is a KeyboardInterrupt as ever; a program ends at it
    even while it waits in a collective (run_program). In a thread beside the main one there are no signals to take."""

    def __init__(self) -> None:
        self.ranks = Ranks()
        """To agree with; set once they have met."""
        self._signalled = self._interrupted = False
        self._file, self._looked = stop_file(), 0.0
        self._pending: tuple[Any, Tensor] | None = None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)
        end_with_launcher()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._signalled = True

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop; other ranks may not know yet."""
        if self._file is not None and time.monotonic() > self._looked + STOP_FILE_SECONDS:
            self._looked = time.monotonic()
            self._signalled = self._signalled or self._file.exists()
        return self._signalled

    def known(self) -> bool:
        """Whether this rank was told to stop or has heard that another was. Waits for nobody; ranks may differ.

        For long work of one's own between two collectives, like rendering images for an evaluation.
        """
        if self.ranks.world_size == 1:
            return self.requested
        store = job_store()
        if self.requested:
            store.set("stop", "1")
            return True
        return bool(store.check(["stop"]))

    def agreed(self) -> bool:
        """Whether any rank had been told to stop at the previous call; every rank gets the same answer.

        Pipelined by one call, so that nobody waits for the slowest rank between two steps.
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
