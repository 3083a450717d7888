"""A job whose rank 1 has a fault: `drift.py [--KEY VALUE ...]` trains a run for each of FAULTS, with its name, and
prints what ended it. A bit flips between the third step and its save; of a gradient, in the fourth step."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config import make_parser, parse
from pipeline.data.resident import ResidentSource
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.errors import TrainingFailed
from pipeline.training.trainer import Trainer
from tests.jobs import changed

BIT = 1 << 18
"""Of a float32's 23 of mantissa: no rounding hides it."""


def flip(tensor: Tensor | None) -> None:
    assert tensor is not None
    with torch.no_grad():
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(BIT)


def flip_gradient(trainer: Trainer) -> None:
    """After it was averaged over the ranks; before, it would be all ranks' gradient."""
    weight = trainer.state.generator.get_parameter("dense.weight")
    trainer.state.generator_optimizer.register_step_pre_hook(lambda *_: flip(weight.grad))


def moment(trainer: Trainer) -> Tensor:
    state = trainer.state
    found = state.critic_optimizer.state[state.critic.get_parameter("score.weight")]["square_avg"]
    assert isinstance(found, Tensor)
    return found


def resident(trainer: Trainer) -> ResidentSource:
    assert isinstance(trainer.inputs._source, ResidentSource)
    return trainer.inputs._source


FAULTS: dict[str, Callable[[Trainer], object]] = {
    "weight": lambda trainer: flip(trainer.state.generator.get_parameter("dense.weight")),
    "average": lambda trainer: flip(trainer.state.ema.get_parameter("dense.bias")),
    "moment": lambda trainer: flip(moment(trainer)),
    "gradient": flip_gradient,
    "images": lambda trainer: resident(trainer)._images[-1, -1, -1, -1:].bitwise_xor_(1),
    "labels": lambda trainer: resident(trainer)._labels[-1:].bitwise_xor_(1),
}


class Drifting(Trainer):
    def take_step(self) -> None:
        super().take_step()
        if self.runtime.ranks.rank == 1 and self.state.step == 3:
            FAULTS[self.config.run.name](self)


def main() -> int:
    config, _ = parse(make_parser("test"), sys.argv[1:])
    runtime = Runtime(config.runtime)
    for name in FAULTS:
        try:
            Drifting(changed(config, run={"name": name}), runtime).run()
        except TrainingFailed as error:
            if runtime.ranks.is_main:
                print(f"{name}: {error}")
    runtime.close()
    return 0


if __name__ == "__main__":
    run_program(main)
