"""Failures for which libraries print a page of traceback, in one line: memory ran out, or another rank is lost."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pipeline.config import Config
from pipeline.distributed.collectives import name_ranks
from pipeline.distributed.process import Runtime
from pipeline.errors import LocalError, RankLost

ROLL_CALL_SECONDS = 5.0
"""The time in which ranks that wait for the same one give up as well: their waits began within one step."""
DUMP_SECONDS = 30.0
"""The time in which NCCL's watchdog notices the time-out too, writes what it has recorded, and ends the process."""
PACKAGE = Path(__file__).parents[1]
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED")
"""The texts of CUDA's, the CPU allocator's and cuBLAS's errors."""


@contextlib.contextmanager
def closing(runtime: Runtime, config: Config) -> Iterator[Runtime]:
    """Yields the runtime and closes it at the end of the block, however that comes.

    Raises:
        LocalError: memory ran out; the message names the settings to change.
        RankLost: another rank did not come to a collective, or its connection is lost, after a line that says so. The
            runtime stays open then: what remains of a job cannot end together.
    """
    with contextlib.ExitStack() as end:
        end.callback(runtime.close)
        try:
            yield runtime
        except (MemoryError, RuntimeError) as error:
            if runtime.ranks.world_size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
                end.pop_all()
                _print_lost_rank(error, runtime)
                raise RankLost from error
            if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
                raise LocalError(_out_of_memory(error, config, runtime.ranks.world_size)) from error
            raise


def record_collectives(prefix: Path) -> None:
    """Has NCCL's flight recorder write its last collectives into files of this prefix, one for each rank, when one of
    them times out. Must be called before there is a process group.

    torch records and writes by default, into a cache folder; a place that the environment names comes first.
    `torchfrtrace` compares the files and names the ranks that fell behind.
    """
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(prefix.absolute()))


def _print_lost_rank(error: Exception, runtime: Runtime) -> None:
    ranks, rank, place = runtime.ranks, runtime.ranks.rank, _place(error)
    if "timed out" not in str(error).lower():
        line = f"[rank {rank}] error: {place}: the connection to another rank is lost; the launcher names who ended"
        print(line, file=sys.stderr, flush=True)
        return
    store, gave_up = ranks.store, [rank]
    assert store is not None
    with contextlib.suppress(dist.DistError):  # the process that serves the store may be the one that is gone
        store.set_timeout(timedelta(seconds=ROLL_CALL_SECONDS))
        store.set(f"gave up {rank}", "")
        time.sleep(ROLL_CALL_SECONDS)
        gave_up = [other for other in range(ranks.world_size) if store.check([f"gave up {other}"])]
    if rank == gave_up[0]:
        absent = [other for other in range(ranks.world_size) if other not in gave_up]
        who = f"{name_ranks(absent)} did not come" if absent else "ranks wait in different collectives, for each other,"
        line = f"error: {place}: {who} within {ranks.timeout} (runtime.timeout_seconds)"
        print(line, file=sys.stderr, flush=True)
    if runtime.device.type == "cuda":
        time.sleep(DUMP_SECONDS)


def _out_of_memory(error: Exception, config: Config, world_size: int) -> str:
    """Returns the message for memory that ran out: how much was missing, where, and the setting that takes less."""
    training, evaluation = config.training, config.evaluation
    frames = {(Path(frame.filename), frame.name) for frame in traceback.extract_tb(error.__traceback__)}
    if any(file.is_relative_to(PACKAGE / "evaluation") for file, _ in frames):
        fix = (
            f"lower evaluation.batch_size ({evaluation.batch_size}) or evaluation.num_images ({evaluation.num_images})"
        )
    elif (PACKAGE / "data/resident.py", "__init__") in frames:  # the whole split; elsewhere it is a batch
        fix = f"set data.source to streaming (it is {config.data.source})"
    else:
        share = f"{training.batch_size}: {training.batch_size // world_size} images a rank"
        fix = (
            f"raise runtime.accumulation ({config.runtime.accumulation}), lower training.batch_size ({share}) "
            f"or network.width ({config.network.width})"
        )
    missing = re.search(r"allocate (\d[\d.]* \w+)", str(error))
    return f"out of memory{f', {missing[1]} more were asked for,' if missing else ''} in {_place(error)}: {fix}"


def _place(error: Exception) -> str:
    """Returns the file, number and text of the innermost line of the package outside this folder: what was being done,
    not how ranks communicate."""
    inside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(PACKAGE) and Path(frame.filename).parent != PACKAGE / "distributed"
    ]
    if not inside:
        return "the beginning"
    return f"{Path(inside[-1].filename).relative_to(PACKAGE.parent)}:{inside[-1].lineno} ({inside[-1].line})"
