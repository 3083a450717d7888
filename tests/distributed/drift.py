"""A job whose rank 1 loses its place: one weight of one replica changes after the third step."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from pipeline.config import make_parser, parse
from pipeline.data import Batch
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer


class Drifting(Trainer):
    def train_step(self, batches: Iterator[Batch]) -> None:
        super().train_step(batches)
        if self.runtime.rank == 1 and self.state.step == 3:
            with torch.no_grad():
                self.state.generator.dense.bias[0] += 1e-6


def main() -> int:
    config, _ = parse(make_parser("test"), sys.argv[1:])
    Drifting(config, Runtime(config.runtime)).run()
    return 0


if __name__ == "__main__":
    run_program(main)
