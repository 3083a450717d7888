"""The ranks of a job: how they meet, and the operations by which they share tensors, flags and objects.

Every rank makes the same calls in the same order. Tensors travel over the default process group (NCCL or gloo), Python
objects and flags over a gloo group beside it, so that these never wait for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pipeline.distributed.launcher import read_number
from pipeline.errors import LocalError, UserError

T = TypeVar("T")
ATTEMPT_SECONDS = 10.0
"""The longest attempt to connect to an address: one whose packets were lost must not take the whole time limit."""
PAUSE_SECONDS = 0.1
"""The time between two attempts."""
HANDSHAKE = timedelta(seconds=60)
"""The longest that a server which accepts connections may take to answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; by default a process alone."""

    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None
    """A gloo group of all ranks; None in a process alone."""
    timeout: timedelta | None = None
    """The limit of the host group's collectives; None: torch's half hour."""

    @classmethod
    def of_job(cls, timeout: timedelta | None = None) -> Ranks:
        """Returns the ranks of the default process group, with a host group; a process alone where there is none."""
        return replace(cls.silent(), timeout=timeout).with_own_group()

    @classmethod
    def silent(cls) -> Ranks:
        """Returns the same ranks without a host group, for code that only needs to know its share."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def with_own_group(self) -> Ranks:
        """Returns the same ranks with another host group, for a thread that communicates beside the main one."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=self.timeout)
        assert isinstance(group, dist.ProcessGroup)
        return replace(self, host_group=group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # -- shares of the work --------------------------------------------------------------------------------------------

    def rows(self, batch_size: int) -> slice:
        """Returns this rank's rows of a global batch. The settings' checks refuse sizes that the number of ranks does
        not divide."""
        share, rest = divmod(batch_size, self.world_size)
        assert not rest, f"{batch_size} rows among {self.world_size} ranks"
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, count: int, unit: int = 1) -> range:
        """Returns this rank's contiguous part of range(count), cut at multiples of `unit`; it may be empty."""
        units = -(-count // unit)
        first, last = (units * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(min(first * unit, count), min(last * unit, count))

    # -- tensors -------------------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Sums elementwise over the ranks, in place. A NaN or infinity on any rank makes one in the result."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Returns the elementwise mean over the ranks; `values` is overwritten."""
        return self.sum(values) / self.world_size

    # -- flags and objects ---------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank, after all ranks have called."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host_group)
        return bool(value)

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in the order of the ranks, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Returns every rank's value on the main rank, None on the others."""
        values = [value] * self.world_size if self.is_main else None
        if self.world_size > 1:
            dist.gather_object(value, values, group=self.host_group)
        return values

    def broadcast(self, value: T) -> T:
        """Returns the main rank's value on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.host_group)
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main rank; every rank returns its result, or raises its UserError.

        An OSError, as of a file that cannot be read, becomes a UserError with the same text.
        """
        result: T | None = None
        error: UserError | None = None
        if self.is_main:
            try:
                result = work()
            except UserError as mistake:
                error = mistake
            except OSError as failure:
                error = UserError(str(failure))
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def on_every_rank(self, work: Callable[[], T], expected: tuple[type[Exception], ...]) -> list[T]:
        """Runs `work` on each rank and returns all results; an expected error of any rank is raised on every rank."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except expected as failure:
            error = failure
        outcomes = self.gather((result, error))
        for rank, (_, error) in enumerate(outcomes):
            if error is not None:
                raise type(error)(f"rank {rank}: {error}")
        return [result for result, _ in outcomes]  # type: ignore[misc]


# -- how the ranks meet ------------------------------------------------------------------------------------------------
# torch waits for an address without end, or ends with a page of C++ frames. Here every wait ends at
# runtime.timeout_seconds, with one line that names what was waited for.


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
        return Ranks.of_job(timeout)


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
            absent = [str(number) for number, key in enumerate(keys) if not store.check([key])]
            raise TimeoutError(f"rank(s) {', '.join(absent)} of {world_size} did not come")
        time.sleep(PAUSE_SECONDS)
