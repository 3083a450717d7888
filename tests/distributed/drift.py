"""A job whose rank 1 loses its place: one weight of one replica changes after the third step."""

from __future__ import annotations

import sys

import torch

from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer


class Drifting(Trainer):
    def take_step(self) -> None:
        super().take_step()
        if self.runtime.ranks.rank == 1 and self.state.step == 3:
            with torch.no_grad():
                self.state.generator.get_parameter("dense.bias")[0] += 1e-6


def main() -> int:
    config, _ = parse(make_parser("test"), sys.argv[1:])
    Drifting(config, Runtime(config.runtime)).run()
    return 0


if __name__ == "__main__":
    run_program(main)
