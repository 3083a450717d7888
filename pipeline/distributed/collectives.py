"""The ranks of a job as one value, and the one vocabulary in which they talk: training, evaluation and checkpoints.

Every rank makes the same calls in the same order. Tensors travel over the default process group (NCCL or gloo), Python
objects and flags over a gloo group beside it, so they never wait for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; the default is a process alone."""

    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None
    """gloo, of all ranks; None in a process alone."""
    timeout: timedelta | None = None
    """Of the host group's collectives; None: torch's half hour."""

    @classmethod
    def of_job(cls, timeout: timedelta | None = None) -> Ranks:
        """The ranks of the default process group, with a host group of their own; alone where there is none."""
        return replace(cls.silent(), timeout=timeout).with_own_group()

    @classmethod
    def silent(cls) -> Ranks:
        """The same without a group to talk in: for who only asks which share is its own."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def with_own_group(self) -> Ranks:
        """The same ranks with a host group of their own, for a thread that talks beside the main one."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=self.timeout)
        assert isinstance(group, dist.ProcessGroup)
        return replace(self, host_group=group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # -- who does what -------------------------------------------------------------------------------------------------

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a global batch, which the world size divides (checks.py refuses others)."""
        share, rest = divmod(batch_size, self.world_size)
        assert not rest, f"{batch_size} rows among {self.world_size} ranks"
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, count: int, unit: int = 1) -> range:
        """This rank's contiguous part of range(count), cut at multiples of `unit`; it may be empty."""
        units = -(-count // unit)
        first, last = (units * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(min(first * unit, count), min(last * unit, count))

    # -- tensors -------------------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks, in place. A NaN or infinity on any rank is one in the result."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise mean over the ranks; `values` is overwritten."""
        return self.sum(values) / self.world_size

    # -- flags and objects ---------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Waits until all ranks have called."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host_group)
        return bool(value)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Every rank's value, on the main rank; None elsewhere."""
        values = [value] * self.world_size if self.is_main else None
        if self.world_size > 1:
            dist.gather_object(value, values, group=self.host_group)
        return values

    def broadcast(self, value: T) -> T:
        """The main rank's value, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.host_group)
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main rank; every rank returns its result, or raises its UserError.

        A file that can't be read or written (OSError) becomes a UserError: it names itself.
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
        except expected as own:
            error = own
        outcomes = self.gather((result, error))
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise type(failure)(f"rank {rank}: {failure}")
        return [found for found, _ in outcomes]  # type: ignore[misc]
