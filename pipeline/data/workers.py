"""Processes that read ahead for the streaming source: started, asked in turn, ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pipeline.errors import UserError

Chunk = tuple[Tensor, Tensor]
"""uint8 [k, b, C, H, W] and int64 [k, b]: k consecutive batches."""
START_SECONDS = 10.0
"""Until a worker that has not started is taken for one that never will; then twice that, and so on."""


def in_workers(chunks: IterableDataset[Chunk | UserError], workers: int) -> Iterator[Chunk]:
    """The chunks of all workers side by side; without workers, read here. The workers end with this generator."""
    iterator = _started(chunks, workers)
    try:
        while True:
            parts: list[Chunk] = []
            for _ in range(max(workers, 1)):  # the loader asks its workers in turn
                item = next(iterator)
                if isinstance(item, UserError):
                    raise item
                parts.append(item)
            images, labels = zip(*parts, strict=True)
            yield parts[0] if len(parts) == 1 else (torch.cat(images, dim=1), torch.cat(labels, dim=1))
    finally:
        del iterator  # joins the workers


def _started(chunks: IterableDataset[Chunk | UserError], workers: int) -> Iterator[Chunk | UserError]:
    """A loader's iterator, once all its workers run.

    CPython before 3.12 forks without its lock on the list of threads. If a thread of C++, as gloo has, enters Python at
    that moment, the child waits for ever for that lock and does nothing else. It is killed, and others are forked.
    """
    seconds = START_SECONDS
    while True:
        started, before = multiprocessing.Semaphore(0), set(multiprocessing.active_children())
        loader = DataLoader(
            chunks,
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator(),  # else it draws from the global one
            worker_init_fn=partial(_begin, started=started),
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of fork in a process with threads; the workers use none of what such threads hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            iterator = iter(loader)
        if all(started.acquire(timeout=seconds) for _ in range(workers)):
            return iterator
        _kill(set(multiprocessing.active_children()) - before)
        del iterator
        seconds *= 2


def _kill(processes: set[BaseProcess]) -> None:
    for process in processes:
        with contextlib.suppress(RuntimeError):  # the loader's own, told of the first one's end by SIGCHLD
            process.kill()
            process.join()


def _begin(_: int, started: Semaphore) -> None:
    """Leaves signals to the parent, then says that this worker has started: Ctrl-C, the launcher and Slurm signal every
    process, and the workers must go on until the parent has saved."""
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end_when_parent_says() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_when_parent_says, daemon=True).start()
    started.release()
