"""Processes that read ahead for the streaming source: started, asked in turn, ended.

Each is a new interpreter, whatever multiprocessing's start method: a fork would copy locks that other threads hold, and
`spawn` would run the user's script again. It gets its share of the lanes and sends its chunks, pickled, through a
socket. DataLoader would send them through /dev/shm, which many containers have too little of, and where 4 MiB cost the
training thread 4 ms in the place of 1.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

from pipeline.data.images import Images, Labels
from pipeline.errors import UserError

Chunk = tuple[Images, Labels]
"""uint8 [k, b, C, H, W] and int64 [k, b]: k consecutive batches."""
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from pipeline.data.workers import work; work()"
BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""Ctrl-C, the launcher and Slurm signal every process, but workers must go on until the rank has saved."""


def read_in_workers(shares: Sequence[Iterable[Chunk]]) -> Iterator[list[Chunk]]:
    """Yields the next chunk of each share; a process reads each. They end with this generator.

    Raises UserError: what a worker raised, or that one could not be started or has ended.
    """
    workers: list[_Worker] = []
    try:
        try:
            workers.extend(_Worker() for _ in shares)
        except OSError as error:
            raise UserError(f"a data worker cannot be started ({error}): data.workers 0 reads without any") from None
        for worker, share in zip(workers, shares, strict=True):  # they have all begun to start by now
            worker.send(share)
        while True:
            yield [worker.receive() for worker in workers]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One such process, seen from the rank."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # the process inherits it
            try:
                self._process = subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, sys.path)], stdin=theirs)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._stream = ours.makefile("rwb")

    def send(self, share: Iterable[Chunk]) -> None:
        with contextlib.suppress(OSError):  # it has ended: `receive` says how
            pickle.dump(share, self._stream, protocol=5)
            self._stream.flush()

    def receive(self) -> Chunk:
        try:
            item: Chunk | UserError = pickle.load(self._stream)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._process.wait()
            how = f"exit code {code}, see above" if code >= 0 else f"{signal.Signals(-code).name}; out of memory?"
            raise UserError(f"a data worker has ended ({how}): data.workers 0 reads without any") from None
        if isinstance(item, UserError):
            raise item
        return item

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # of a share that it did not take
            self._stream.close()


def work() -> None:
    """What a worker does: the socket is its standard input."""
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what it starts itself must not read from the socket
    with connection.makefile("rwb") as stream:

        def send(item: Chunk | UserError) -> None:
            pickle.dump(item, stream, protocol=5)
            stream.flush()

        try:
            share: Iterable[Chunk] = pickle.load(stream)
        except EOFError:
            return  # the rank has ended already
        threading.Thread(target=_end_with_the_rank, args=[connection], daemon=True).start()
        try:
            for chunk in share:
                send(chunk)
        except UserError as error:
            send(error)
        except ConnectionError:
            os._exit(1)  # the rank ends, and the thread has not seen it yet


def _end_with_the_rank(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        connection.recv(1)  # nothing more comes but the end
    os._exit(1)
