"""How a rank uses a CPU: its share of the cores, its threads, its memory, its arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import weakref

import torch

from pipeline.distributed.launcher import told

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""
LARGEST_MMAP_THRESHOLD = 32 * 2**20


def use_cpu(cores: list[int], threads: int | None) -> None:
    """Settles this process on its share of `cores`, the machine's; `threads` None: one a core of the share."""
    # Saturated pixels have gradients below float32's normal range, each of which costs a CPU some 100 cycles: a fifth
    # of the quickstart's later steps. Threads inherit this from the one that makes them.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or max(1, len(cores) // told("LOCAL_WORLD_SIZE", 1)))
    bind_to_share(cores)
    _keep_freed_memory()


def flushes_denormals() -> bool:
    """Whether this thread takes numbers below the normal range for 0, which torch can set but does not tell."""
    return torch.tensor([1e-40]).mul(1.0).view(torch.int32).item() == 0


def bind_to_share(cores: list[int]) -> None:
    """Binds the calling thread to this rank's share of the cores, where there is one for each.

    Or the threads that move a rank's messages wait for a core on which another rank computes.
    """
    ranks, rank = told("LOCAL_WORLD_SIZE", 1), told("LOCAL_RANK", 0)
    if ranks <= len(cores):
        first, last = (len(cores) * number // ranks for number in (rank, rank + 1))
        os.sched_setaffinity(0, cores[first:last])


class ThreadClock:
    """Of the thread that makes it: the time that it has run or waited for a core, so not that in which it slept."""

    def __init__(self) -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):  # a kernel that keeps no such account: the time that the thread has run
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def seconds(self) -> float:
        """Since some moment; it is to be read in the same thread."""
        if self._file is None:
            return time.thread_time()
        running, runnable, _ = os.pread(self._file, 64, 0).split()
        return (int(running) + int(runnable)) / 1e9


def _keep_freed_memory() -> None:
    """glibc gives large freed blocks back to the system, and the next tensor faults their pages in again: a sixth of a
    step of small networks. Kept, they are used again at once."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Freed memory goes back to the system, now and later, as it does in a process that has freed a block of 32 MiB:
    glibc moves its thresholds with the blocks that are freed until somebody sets one."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)
