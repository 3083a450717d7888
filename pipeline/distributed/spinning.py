"""How long OpenMP's threads spin for one another, which depends on whether they have the cores for themselves.

A thread that waits for the others of its team spins, by default for some milliseconds, since it costs some 50
microseconds to wake it: alone, a sixth of the quickstart's steps. Beside another busy process it spins away the time of
the core that the others need, and a step takes 30 times as long. GNU's OpenMP has a short wait for a process with more
threads than cores (libgomp's gomp_throttled_spin_count_var). So while this process's threads have to queue for a core,
it is given a second team, which sleeps. No result depends on it, as one would on the number of threads that compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PERIOD = 0.5
"""Seconds between two looks."""
CROWDED = 0.1
"""Seconds a second that the process's threads wait for a core, all together; above it others want the cores. Alone it
is 0.01, beside one busy process 0.7."""
QUIET_PERIODS = 4
"""Below it, in a row, after which the cores are taken to be free."""


@contextlib.contextmanager
def sharing_the_cores() -> Iterator[None]:
    """Keeps watch within the block, where there are GNU's OpenMP and Linux's account of waiting threads."""
    try:
        waits, team = seconds_waited_for_cores(), SleepingTeam()
    except (OSError, AttributeError):
        yield
        return
    over = threading.Event()

    def watch(waited: float) -> None:
        moment, quiet = time.monotonic(), 0
        while not over.wait(PERIOD):
            before, waited = waited, seconds_waited_for_cores()
            then, moment = moment, time.monotonic()
            quiet = 0 if waited - before > CROWDED * (moment - then) else quiet + 1
            if quiet == 0:
                team.start()
            elif quiet == QUIET_PERIODS:
                team.stop()

    watcher = threading.Thread(target=watch, args=(waits,), name="spinning", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        team.stop()


def seconds_waited_for_cores() -> float:
    """That the threads which this process has now were ready to run and did not; 0 where no account of it is kept.

    Raises:
        OSError: the system is not Linux.
    """
    nanoseconds = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9


class SleepingTeam:
    """Threads of OpenMP, one more than the machine's cores, that have nothing to do.

    Raises:
        AttributeError: torch computes with another OpenMP than GNU's.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._in_parallel = self._library.GOMP_parallel
        self._over: threading.Event | None = None

    def start(self) -> None:
        """Nothing where the team is there."""
        if self._over is None:
            self._over = threading.Event()
            threading.Thread(target=self._keep, args=(self._over,), name="sleeping team", daemon=True).start()

    def stop(self) -> None:
        if self._over is not None:
            self._over.set()
            self._over = None

    def _keep(self, over: threading.Event) -> None:
        """A team lasts as long as the thread that made it."""
        nothing_much = ctypes.cast(self._library.getpid, ctypes.c_void_p)
        self._in_parallel(nothing_much, None, (os.cpu_count() or 1) + 1, 0)
        over.wait()
