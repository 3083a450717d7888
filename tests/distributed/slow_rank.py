"""A job whose rank 1 has a burden at each of its steps: `slow_rank.py reads|computes [--KEY VALUE ...]`.

reads: real images come late, as from a busy file system. computes: its thread runs for longer than the others'.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from pipeline.config import make_parser, parse
from pipeline.data import Batch, Source
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer

BURDEN_SECONDS = 0.5


class SlowSource:
    def __init__(self, source: Source) -> None:
        self._source = source

    def batches(self, first: int) -> Iterator[Batch]:
        for batch in self._source.batches(first):
            time.sleep(BURDEN_SECONDS)
            yield batch

    def damage(self) -> str | None:
        return self._source.damage()


class BurdenedTrainer(Trainer):
    def take_step(self) -> None:
        until = time.thread_time() + BURDEN_SECONDS
        while time.thread_time() < until:
            pass
        super().take_step()


def main() -> None:
    config, _ = parse(make_parser("test"), sys.argv[2:])
    runtime = Runtime(config.runtime)
    slow = runtime.ranks.rank == 1
    trainer = (BurdenedTrainer if slow and sys.argv[1] == "computes" else Trainer)(config, runtime)
    if slow and sys.argv[1] == "reads":
        trainer.inputs._source = SlowSource(trainer.inputs._source)
    trainer.run()
    runtime.close()


if __name__ == "__main__":
    run_program(main)
