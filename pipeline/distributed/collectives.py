"""The ranks of a job, and the operations by which they share tensors, flags and objects.

Every rank makes the same calls in the same order. Tensors travel over the default process group (NCCL or gloo), Python
objects and flags over a gloo group beside it, so that these never wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from pipeline.errors import UserError

T = TypeVar("T")


def name_ranks(ranks: Iterable[int]) -> str:
    """Returns the ranks as a message names them: "rank 1", or "ranks 1, 2"."""
    numbers = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; by default a process alone."""

    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None
    """A gloo group of all ranks; None in a process alone."""
    store: Store | None = None
    """The key-value store at which the ranks have met; None in a process alone."""
    timeout: timedelta | None = None
    """The limit of the host group's collectives; None: torch's half hour."""

    @classmethod
    def without_group(cls) -> Ranks:
        """Returns the ranks of the default process group, without a host group; a process alone where there is none."""
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
        outcome: T | UserError | None = None
        if self.is_main:
            try:
                outcome = work()
            except (UserError, OSError) as error:
                outcome = error if isinstance(error, UserError) else UserError(str(error))
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome  # type: ignore[return-value]

    def on_every_rank(self, work: Callable[[], T], expected: tuple[type[Exception], ...]) -> list[T]:
        """Runs `work` on each rank and returns all results; an expected error of any rank is raised on every rank."""
        outcome: T | Exception
        try:
            outcome = work()
        except expected as error:
            outcome = error
        outcomes = self.gather(outcome)
        for rank, other in enumerate(outcomes):
            if isinstance(other, Exception):
                raise type(other)(f"rank {rank}: {other}")
        return outcomes  # type: ignore[return-value]
