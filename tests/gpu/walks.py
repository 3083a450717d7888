"""Trainers on a GPU and the steps that they take, which the tests compare."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config, make_parser, parse
from pipeline.data.prepare import prepare_npz
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer

NUM_PICTURES, NUM_CLASSES = 4096, 10


class Bench:
    """Makes runs of the shipped configurations in a folder of its own.

    Args:
        arguments: settings of the pipeline that hold in every run, as on a command line.
    """

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.folder, self.arguments, self._numbers = folder, arguments, itertools.count()
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (NUM_PICTURES, 28, 28), dtype=np.uint8)
        np.savez(folder / "pictures.npz", images=images, labels=np.arange(NUM_PICTURES) % NUM_CLASSES)
        prepare_npz(folder, "pictures", {"train": folder / "pictures.npz"})

    def command_line(self, name: str, settings: Mapping[str, Any]) -> list[str]:
        """Returns the arguments of a run of `configs/NAME.yaml` on the pictures, without evaluations."""
        all_settings: dict[str, Any] = {"run.trackers": [], "evaluation.every": None}
        all_settings |= {"data.dataset": str(self.folder / "pictures"), "run.root": str(self.folder / "runs")}
        all_settings |= settings
        flags = [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in all_settings.items()]
        return ["--config", f"configs/{name}.yaml", *self.arguments, *flags]

    def config(self, name: str, settings: Mapping[str, Any]) -> Config:
        return parse(make_parser(""), self.command_line(name, settings))[0]

    @contextmanager
    def trainer(self, name: str = "wgan", **runtime: Any) -> Iterator[Trainer]:
        """Yields the trainer of a new run of `configs/NAME.yaml`; the keywords are settings of `runtime`."""
        settings = {f"runtime.{key}": value for key, value in runtime.items()}
        with trainer_of(self.config(name, settings | {"run.name": f"run-{next(self._numbers)}"})) as trainer:
            yield trainer


@contextmanager
def trainer_of(config: Config) -> Iterator[Trainer]:
    process = Runtime(config.runtime)
    try:
        trainer = Trainer(config, process)
        try:
            yield trainer
        finally:
            trainer.inputs.close()
    finally:
        process.close()


def without_graphs(runtime: Runtime) -> Runtime:
    """Returns the same process, where what would be captured is run as it is."""
    eager = copy.copy(runtime)
    eager.capture_stream = None
    return eager


class Walk(NamedTuple):
    """A few steps, on the CPU."""

    losses: Tensor
    """(steps, 3)."""
    end: dict[str, Tensor]
    """Tensors of the state after the last step."""

    def difference(self, other: Walk) -> float:
        """Returns the largest absolute difference of a loss or a number of the final states."""
        pairs = [(self.losses, other.losses), *((tensor, other.end[name]) for name, tensor in self.end.items())]
        # A maximum of Python's would lose a NaN.
        return torch.stack([(one.double() - two.double()).abs().max() for one, two in pairs]).max().item()


def walk(trainer: Trainer, steps: int) -> Walk:
    """Takes some steps and returns what they gave."""
    take_steps(trainer, steps)
    return Walk(trainer.log.losses(), state_of(trainer))


def take_steps(trainer: Trainer, steps: int) -> None:
    """Queues some steps; nothing waits for the device."""
    trainer.log.begin()
    for _ in range(steps):
        trainer.take_step()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.state.tensors().items()}
