"""How a rank uses a CPU: its share of the cores, its threads and how they wait, its memory, its arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pipeline.distributed.launcher import read_number

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt: how many bytes at the heap's end are returned to the system, and from which size on a
block is mapped by itself and so returned when it is freed."""
LARGEST_MMAP_THRESHOLD = 32 * 2**20
CROWDED = 0.1
"""Seconds of waiting per second, summed over the process's threads, above which others must want the cores. It is 0.01
in a process alone, 0.7 beside one busy process."""
PROFILER_LEVEL = "KINETO_LOG_LEVEL"
"""The environment variable for the least severity of what torch's profiler prints."""
PERIOD_SECONDS, QUIET_SECONDS = 0.5, 1.5
"""The times over which threads must wait that much until others are taken to want the cores, and must not until these
are taken to be free again."""


# -- cores, arithmetic, memory -----------------------------------------------------------------------------------------


def available_cores() -> list[int]:
    """Returns the numbers of the cores that this process may use; all of them where the system has no such limit."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_cpu(cores: Sequence[int], threads: int | None) -> None:
    """Prepares this process for computing on its share of `cores`, the machine's, with `threads` (None: one for each
    core of the share)."""
    # Saturated pixels have gradients below float32's normal range, each of which costs a CPU some 100 cycles: a fifth
    # of the quickstart's later steps. Threads inherit this setting from the thread that creates them.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or max(1, len(cores) // read_number("LOCAL_WORLD_SIZE", 1)))
    bind_to_share(cores)
    os.environ.setdefault(PROFILER_LEVEL, "99")  # or torch's profiler calls a GPU that is not there an error
    # glibc returns large freed blocks to the system, and the next tensor faults their pages in again: a sixth of a step
    # of small networks.
    _call_glibc("mallopt", MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    _call_glibc("mallopt", TRIM_THRESHOLD, 2**31 - 1)


def bind_to_share(cores: Sequence[int]) -> None:
    """Binds the calling thread to this rank's share of `cores`, if there is at least one core for each rank. Otherwise
    the threads that move a rank's messages would wait for a core on which another rank computes."""
    ranks, rank = read_number("LOCAL_WORLD_SIZE", 1), read_number("LOCAL_RANK", 0)
    if ranks <= len(cores):
        first, last = (len(cores) * number // ranks for number in (rank, rank + 1))
        _bind(cores[first:last])


@contextlib.contextmanager
def restoring_cpu() -> Iterator[None]:
    """Restores, at the end of the block, the process's cores, its threads and what they do with subnormal numbers, and
    what the profiler prints."""
    cores, threads, level = available_cores(), torch.get_num_threads(), os.environ.get(PROFILER_LEVEL)
    flushes = torch.tensor([1e-40]).mul(1.0).view(torch.int32).item() == 0  # torch can set this but not return it
    try:
        yield
    finally:
        _bind(cores)
        torch.set_num_threads(threads)
        # OpenMP's threads keep the cores and the arithmetic that they were created with: new ones have to be created.
        with contextlib.suppress(AttributeError):  # OpenMP before 5.0
            ctypes.CDLL(None).omp_pause_resource_all(1)
        torch.set_flush_denormal(flushes)
        if level is None:
            os.environ.pop(PROFILER_LEVEL, None)


def release_freed_memory() -> None:
    """Returns freed memory to the system, now and later, as a process does that has freed a block of 32 MiB: glibc
    adapts its thresholds to the blocks that are freed until they are set for the first time."""
    _call_glibc("mallopt", TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
    _call_glibc("malloc_trim", 0)


def _bind(cores: Sequence[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _call_glibc(function: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)


# -- how threads wait for each other -----------------------------------------------------------------------------------
# A thread of OpenMP that waits for the others of its team spins, by default for some milliseconds, since it costs some
# 50 microseconds to wake it: in a process alone that saves a sixth of the quickstart's steps. Beside another busy
# process it spins away the time of the core that the others need, and a step takes 30 times as long. GNU's OpenMP spins
# only briefly in a process with more threads than cores (libgomp's gomp_throttled_spin_count_var). So while this
# process's threads have to queue for a core, it gets a second team, which sleeps. No result depends on that, as it
# would on the number of threads that compute.


@contextlib.contextmanager
def sharing_the_cores() -> Iterator[None]:
    """Watches, within the block, how long threads wait for a core, and has them spin or sleep accordingly. Does nothing
    without GNU's OpenMP or Linux's account of waiting threads."""
    if not Path("/proc/self/schedstat").exists() or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        yield
        return
    over = threading.Event()

    def is_crowded(seconds: float) -> bool:
        """Returns, after so many seconds, whether threads queued for a core in them; False at the block's end."""
        waited, started = seconds_waited_for_cores(), time.monotonic()
        is_over = over.wait(seconds)
        return not is_over and seconds_waited_for_cores() - waited > CROWDED * (time.monotonic() - started)

    def watch() -> None:
        while not over.is_set():
            if is_crowded(PERIOD_SECONDS):
                with sleeping_team():
                    while is_crowded(QUIET_SECONDS):
                        pass

    watcher = threading.Thread(target=watch, name="spinning", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def sleeping_team() -> Iterator[None]:
    """Keeps, within the block, a team of OpenMP's threads that have nothing to do, one more than the machine has cores.
    Needs GNU's OpenMP."""
    library, over = ctypes.CDLL(None), threading.Event()

    def hold() -> None:
        harmless = ctypes.cast(library.getpid, ctypes.c_void_p)  # each thread of the team calls it once
        library.GOMP_parallel(harmless, None, (os.cpu_count() or 1) + 1, 0)
        over.wait()  # the team exists as long as the thread that created it

    threading.Thread(target=hold, name="sleeping team", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def seconds_waited_for_cores() -> float:
    """Returns the seconds for which the present threads of this process were ready to run but had no core.

    Raises:
        OSError: the system is not Linux.
    """
    nanoseconds = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9
