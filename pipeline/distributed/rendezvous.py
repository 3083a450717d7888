"""How the ranks of a job find each other.

torch's own wait for an address ends with a page of C++ frames, if it ends. Here every wait ends at
`runtime.timeout_seconds`, with one line that names what was waited for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pipeline.distributed.collectives import Ranks, name_ranks
from pipeline.distributed.launcher import read_number
from pipeline.errors import LocalError

ATTEMPT_SECONDS = 10.0
"""The longest attempt to connect to an address: one whose packets were lost must not take the whole time limit."""
PAUSE_SECONDS = 0.1
"""The time between two attempts."""
HANDSHAKE = timedelta(seconds=60)
"""The longest that a server which accepts connections may take to answer."""


def join_process_group(backend: str, timeout: timedelta) -> Ranks:
    """Creates the default process group and the host group of all ranks that a launcher started.

    Raises:
        LocalError: an environment variable that launchers set is missing or is no port, the address where the ranks
            meet does not answer, another rank does not come, or one cannot connect to another.
    """
    world_size = read_number("WORLD_SIZE", 1)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LocalError(f"WORLD_SIZE is {world_size}, but {name} is not set: start with a launcher")
    rank, host, port = read_number("RANK", 0), os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise LocalError(f"the environment variable MASTER_PORT is {port}, no port: give one from 1 to 65535")
    # torchrun and `accelerate launch` serve the store themselves. Without them the first rank does.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + timeout.total_seconds()
    fix = "the launcher's main_process_ip must name a host that every rank reaches"
    with _in_one_line(f"the ranks did not meet at {host}:{port}", timeout, fix):
        if not serves:
            _wait_for_answer(host, port, deadline)
        with _without_log_of_cpp():
            address, handshake = "localhost" if serves else host, min(timeout, HANDSHAKE)
            store = TCPStore(address, port, None, serves, handshake, wait_for_workers=False, multi_tenant=True)
        store.set_timeout(timeout)
        # The launcher's store outlives the ranks that it restarts (`--max_restarts`): without a prefix of its own, an
        # attempt would read the addresses of dead ranks there.
        attempt = PrefixStore(f"attempt {read_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _call_roll(attempt, rank, world_size, deadline)
    fix = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME must name the network interface that the machines share"
    with _in_one_line("the ranks have met but do not reach each other", timeout, fix), _without_log_of_cpp():
        dist.init_process_group(backend, timeout=timeout, store=attempt, rank=rank, world_size=world_size)
        return Ranks(rank, world_size, store=attempt, timeout=timeout).with_own_group()


@contextlib.contextmanager
def _in_one_line(failure: str, timeout: timedelta, fix: str) -> Iterator[None]:
    """Turns errors of the block into a LocalError of one line."""
    try:
        yield
    except (RuntimeError, OSError, UnicodeError) as error:  # UnicodeError: the text cannot be the name of a host
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = reason.partition("\n")[0].partition(". Exception raised from")[0]  # a page of C++ frames follows
        limit = f"runtime.timeout_seconds {timeout.total_seconds():.0f}"
        raise LocalError(f"{failure} within {limit} ({reason}); {fix}") from None


def _wait_for_answer(host: str, port: int, deadline: float) -> None:
    """Waits until a connection is accepted there: the host's name may become known, and its server start, after this
    rank. At the deadline it raises what the last attempt raised."""
    while True:
        remaining = max(PAUSE_SECONDS, deadline - time.monotonic())
        try:
            return socket.create_connection((host, port), timeout=min(remaining, ATTEMPT_SECONDS)).close()
        except OSError:
            if time.monotonic() + PAUSE_SECONDS > deadline:
                raise
        time.sleep(PAUSE_SECONDS)


@contextlib.contextmanager
def _without_log_of_cpp() -> Iterator[None]:
    """Drops what the block writes to standard error, unless the user has set torch's level of logging: before it
    raises, torch logs a page of frames for each attempt to connect."""
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        yield
        return
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _call_roll(store: Store, rank: int, world_size: int, deadline: float) -> None:
    """Waits until every rank has set its key in the store. At the deadline it raises TimeoutError with the numbers of
    those that have not."""
    keys = [f"rank {number}" for number in range(world_size)]
    store.set(keys[rank], "")
    while not store.check(keys):  # `store.wait` would log its time-out
        if time.monotonic() > deadline:
            absent = name_ranks(number for number, key in enumerate(keys) if not store.check([key]))
            raise TimeoutError(f"{absent} of {world_size} did not come")
        time.sleep(PAUSE_SECONDS)
