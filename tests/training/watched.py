"""Trains runs and fails if anything but a step changes what is trained: `watched.py CONFIGS`, as for train_many.py."""

from __future__ import annotations

import pickle
import random
import sys
from base64 import b64decode

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.checks.machine import examine
from pipeline.config import Config
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.storage.checkpoint import sha256_of_tensor
from pipeline.storage.run_folder import RunFolder
from pipeline.training.inputs import StepInputs
from pipeline.training.state import TrainingState
from pipeline.training.trainer import Trainer


def described(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies, how, and what is in it."""
    return tensor.data_ptr(), tensor.stride(), tensor.dtype, sha256_of_tensor(tensor.detach().cpu().contiguous())


def snapshot(state: TrainingState) -> dict[str, object]:
    """Everything about a state that a step could notice."""
    parts: dict[str, object] = {"step": state.step, "scaler": state.scaler.state_dict()}
    for role in ("generator", "critic", "ema"):
        network: nn.Module = getattr(state, role)
        for name, tensor in network.state_dict(keep_vars=True).items():
            parts[f"{role}.{name}"] = described(tensor), tensor.requires_grad
            parts[f"{role}.{name} gradient"] = None if tensor.grad is None else described(tensor.grad)
        for name, module in network.named_modules():
            hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
            parts[f"{role}.{name} module"] = type(module), module.training, hooks, vars(module).get("forward")
    for role in ("generator", "critic"):
        optimizer: torch.optim.Optimizer = getattr(state, f"{role}_optimizer")
        for number, group in enumerate(optimizer.param_groups):
            parts[f"{role}_optimizer.{number}"] = group | {"params": [*map(id, group["params"])]}
        for index, (parameter, values) in enumerate(optimizer.state.items()):
            for name, value in values.items():
                parts[f"{role}_optimizer.{index}.{name}"] = id(parameter), described(value)
    parts["random numbers"] = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    parts["arithmetic"] = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    return parts


class Watched:
    """A step that finds what is trained as the step before has left it."""

    def __init__(self, trainer: Trainer) -> None:
        self._step, self._state = trainer.step, trainer.state
        self._left: dict[str, object] = {}
        self.steps = 0

    def __call__(self, inputs: StepInputs) -> Tensor:
        self.check()
        losses = self._step(inputs)
        self._left = snapshot(self._state) | {"step": self._state.step + 1}
        self.steps += 1
        return losses

    def check(self) -> None:
        if self._left:
            now = snapshot(self._state)
            assert now.keys() == self._left.keys()
            changed = [name for name in now if now[name] != self._left[name]]
            assert not changed, f"after step {self._state.step} there changed {', '.join(changed)}"


def main() -> int:
    configs: list[Config] = pickle.loads(b64decode(sys.argv[1]))
    runtime = Runtime(configs[0].runtime)
    for config in configs:
        trainer = Trainer(config, runtime)
        parameters = [
            weight for network in (trainer.state.generator, trainer.state.ema) for weight in network.parameters()
        ]
        assert {weight.device for weight in parameters} == {runtime.device}
        trainer.step = watched = Watched(trainer)
        trainer.run()
        watched.check()
        run = RunFolder(config.folder)
        for path in (run.scores(2), run.grid(2), run.profile(3, 3, 0), run.best_export, run.report("html"), run.export):
            assert path.exists() or not runtime.ranks.is_main, f"it was on, but there is no {path}"
        examined = list(examine(config, runtime.ranks, False))
        assert "error" not in {finding.level for finding in examined}, examined
        watched.check()
        assert watched.steps == config.training.steps
    runtime.close()
    return 0


if __name__ == "__main__":
    run_program(main)
