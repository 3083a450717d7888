"""Processes that read ahead for the streaming source: started, asked in turn, ended.

A rank starts one new interpreter, which imports what reading takes and forks itself into the workers. So nothing of the
rank goes on in them, neither a device nor a lock that one of its threads holds; multiprocessing's start method and the
user's script, which its `spawn` would run again, do not matter; and memory and start are paid once, not for each.

Chunks come pickled through a socket for each worker. DataLoader would send them through /dev/shm, which many containers
have too little of, and where 4 MiB cost the training thread 4 ms in the place of 1.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from pipeline.data.images import Images, Labels
from pipeline.errors import UserError

Chunk = tuple[Images, Labels]
"""uint8 [k, b, C, H, W] and int64 [k, b]: k consecutive batches."""
PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from pipeline.data.workers import fork_workers as f; f(sys.argv[1])"
BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""Ctrl-C, the launcher and Slurm signal every process, but workers must go on until the rank has saved."""
END_SECONDS = 10.0
"""Workers end at once, unless a file system does not answer."""


def read_in_workers(shares: Sequence[Iterable[Chunk]]) -> Iterator[list[Chunk]]:
    """Yields the next chunk of each share; a process reads each. They end with this generator.

    Raises UserError: what a worker raised, or that one has ended or could not be started.
    """
    with ExitStack() as end:
        try:
            streams = _start(shares, end)
        except OSError as error:
            raise UserError(f"data workers cannot be started ({error}): data.workers 0 reads without any") from None
        while True:
            yield [_receive(stream) for stream in streams]


def _start(shares: Sequence[Iterable[Chunk]], end: ExitStack) -> list[BinaryIO]:
    """Starts the workers; returns what each sends. `end` ends them: their standard input is closed, as when the rank
    dies."""
    streams: list[BinaryIO] = []
    with ExitStack() as theirs:
        descriptors: list[int] = []
        for _ in shares:
            receiver, sender = socket.socketpair()
            with receiver:
                streams.append(end.enter_context(receiver.makefile("rb")))
            descriptors.append(theirs.enter_context(sender).fileno())
        arguments = [",".join(map(str, descriptors)), *map(str, sys.path)]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # the processes inherit it
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments], stdin=subprocess.PIPE, pass_fds=descriptors
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert process.stdin is not None
    end.callback(_end, process)
    with suppress(BrokenPipeError):  # it has ended already: `_receive` says so
        pickle.dump(shares, process.stdin)
        process.stdin.flush()
    return streams


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _receive(stream: BinaryIO) -> Chunk:
    try:
        item: Chunk | UserError = pickle.load(stream)
    except (EOFError, OSError, pickle.UnpicklingError):
        raise UserError(
            "a data worker has ended, for lack of memory or for the reason above: data.workers 0 reads without any"
        ) from None
    if isinstance(item, UserError):
        raise item
    return item


# -- in the new interpreter --------------------------------------------------------------------------------------------


def fork_workers(descriptors: str) -> NoReturn:
    """Becomes a worker for each share that comes through the standard input, with a socket for each; waits for them.

    No other thread runs Python here, so a fork is safe.
    """
    control = os.dup(0)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)  # commands of shard URLs must not read from it
    with open(control, "rb", closefd=False) as stream:
        shares: Sequence[Iterable[Chunk]] = pickle.load(stream)  # imports what they are made of
    sockets = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors.split(",")]
    for share, connection in zip(shares, sockets, strict=True):
        if os.fork() == 0:
            for other in sockets:
                if other is not connection:
                    other.close()  # or the rank would not see that another worker has ended
            _work(share, connection, control)
    for connection in sockets:
        connection.close()
    for _ in shares:
        os.wait()
    os._exit(0)  # at once: taking torch apart takes a second


def _work(share: Iterable[Chunk], connection: socket.socket, control: int) -> NoReturn:
    threading.Thread(target=_end_with_the_rank, args=[control], daemon=True).start()
    try:
        with connection.makefile("wb") as stream:
            try:
                for chunk in share:
                    pickle.dump(chunk, stream, protocol=5)  # which copies no array
            except UserError as error:
                pickle.dump(error, stream)
    except ConnectionError:
        pass  # the rank ends, and the thread has not seen it yet
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _end_with_the_rank(control: int) -> None:
    os.read(control, 1)  # nothing comes but the end
    os._exit(0)
