"""How a signal ends an evaluation: on all ranks together, and between the parts of a long computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from pipeline.distributed.collectives import Ranks
from pipeline.errors import Preempted, UserError

T = TypeVar("T")


def never() -> bool:
    """The `interrupted` of an evaluation that runs to its end."""
    return False


_interrupted: ContextVar[Callable[[], bool]] = ContextVar("interrupted", default=never)


def check_interrupted() -> None:
    """Raises Preempted in an `interruptible` block that is to end; does nothing elsewhere.

    Scores call it between the parts of a long computation, some seconds apart.
    """
    if _interrupted.get()():
        raise Preempted("the evaluation was interrupted: start it again")


@contextmanager
def interruptible(ranks: Ranks, interrupted: Callable[[], bool]) -> Iterator[None]:
    """Runs a block that every rank enters, which `check_interrupted` leaves on the ranks where `interrupted()` is true.

    A rank waits at the end of the block for the others. What the block raises on any rank is raised on all: UserError,
    as for a damaged shard in that rank's share, before Preempted and OSError, as for a file that cannot be written.
    """
    token = _interrupted.set(interrupted)
    failure: Exception | None = None
    try:
        yield
    except (Preempted, UserError, OSError) as error:
        failure = error
    finally:
        _interrupted.reset(token)
    failures = ranks.gather(failure)
    for rank, other in enumerate(failures):
        if isinstance(other, UserError):
            raise type(other)(f"rank {rank}: {other}" if ranks.world_size > 1 else str(other))
    for other in filter(None, failures):
        raise other


def interruptible_on_main(ranks: Ranks, interrupted: Callable[[], bool], work: Callable[[], T]) -> T:
    """Runs `work` on the main rank in an `interruptible` block; every rank returns its result."""
    result: T | None = None
    with interruptible(ranks, interrupted):
        if ranks.is_main:
            result = work()
    return ranks.broadcast(result)  # type: ignore[return-value]
