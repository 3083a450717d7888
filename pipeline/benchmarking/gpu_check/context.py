"""What the checks share: settings, pictures, trainers, the steps that they take."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Context:
    """Of one process of the check."""

    folder: Path
    """Where checks leave what later ones, of other processes, compare with; it holds the pictures."""
    arguments: list[str]
    """Settings of the pipeline that hold in every check, as on a command line."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def prepare_pictures(self) -> None:
        """Noise in MNIST's form as a dataset: the check needs no network."""
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (NUM_PICTURES, 28, 28), dtype=np.uint8)
        np.savez(self.folder / "pictures.npz", images=images, labels=np.arange(NUM_PICTURES) % NUM_CLASSES)
        prepare_npz(self.folder, "pictures", {"train": self.folder / "pictures.npz"})

    def command_line(self, name: str, settings: Mapping[str, Any]) -> list[str]:
        """Of a run of `configs/NAME.yaml` on the pictures, without evaluations, in the folder."""
        own: dict[str, Any] = {"run.trackers": [], "evaluation.every": None}
        own |= {"data.dataset": str(self.folder / "pictures"), "run.root": str(self.folder / "runs")}
        own |= settings
        flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items()]
        return ["--config", f"configs/{name}.yaml", *self.arguments, *flags]

    def config(self, name: str, settings: Mapping[str, Any]) -> Config:
        return parse(make_parser(""), self.command_line(name, settings))[0]

    @contextmanager
    def trainer(self, name: str = "wgan", **runtime: Any) -> Iterator[Trainer]:
        """A new run of `configs/NAME.yaml`; the keywords are settings of `runtime`."""
        settings = {f"runtime.{key}": value for key, value in runtime.items()}
        with self.trainer_of(self.config(name, settings | {"run.name": f"run-{next(self._numbers)}"})) as trainer:
            yield trainer

    @contextmanager
    def trainer_of(self, config: Config) -> Iterator[Trainer]:
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
    """The same process, where what would be captured is run as it is."""
    eager = copy.copy(runtime)
    eager.capture_stream = None
    return eager


class Walk(NamedTuple):
    """A few steps. All is on the CPU."""

    losses: Tensor
    """(steps, 3)."""
    start: dict[str, Tensor]
    """Tensors of the state before the first step."""
    end: dict[str, Tensor]

    def difference(self, other: Walk) -> float:
        """The largest absolute difference of a loss or a number of the final states."""
        pairs = [(self.losses, other.losses), *((tensor, other.end[name]) for name, tensor in self.end.items())]
        # A maximum of Python's would lose a NaN.
        return torch.stack([(one.double() - two.double()).abs().max() for one, two in pairs]).max().item()

    def deviation(self, other: Walk) -> float:
        """How far this walk's weights end from the other's, by how far that one came, means over all weights."""
        apart = moved = torch.zeros((), dtype=torch.float64)
        for name, start in other.start.items():
            if start.is_floating_point():
                theirs = other.end[name].double()
                apart = apart + (self.end[name].double() - theirs).abs().sum()
                moved = moved + (theirs - start.double()).abs().sum()
        return (apart / moved).item()


def walk(trainer: Trainer, steps: int) -> Walk:
    start = snapshot(trainer)
    take_steps(trainer, steps)
    return Walk(trainer.log.losses(), start, snapshot(trainer))


def take_steps(trainer: Trainer, steps: int) -> None:
    """Queues them; nobody waits for the device."""
    trainer.log.begin()
    for _ in range(steps):
        trainer.take_step()


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.state.tensors().items()}
