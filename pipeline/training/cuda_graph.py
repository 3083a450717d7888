"""A step captured as one CUDA graph: one launch in the place of some hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.training.inputs import StepInputs
from pipeline.training.state import TrainingState

WARM_UP_STEPS = 11
"""Before a capture: as many as DDP takes to settle."""


class CapturedStep:
    """The same step through inputs that stay where they are in memory; without a CUDA device it is run as it is.

    The first call warms up and captures; the state is put back to what it was before.
    """

    def __init__(self, step: Callable[[StepInputs], Tensor], state: TrainingState) -> None:
        self._step, self._state = step, state
        self._inputs: StepInputs | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses = torch.empty(0)

    def __call__(self, inputs: StepInputs) -> Tensor:
        if self._inputs is None:
            self._inputs = StepInputs._make(value.clone() if isinstance(value, Tensor) else value for value in inputs)
            if inputs.real.is_cuda:
                self._capture(self._inputs)
        self._inputs = StepInputs._make(
            mine.copy_(new) if isinstance(mine, Tensor) and isinstance(new, Tensor) else new
            for mine, new in zip(self._inputs, inputs, strict=True)
        )
        if self._graph is None:
            return self._step(self._inputs)
        self._graph.replay()
        return self._losses.clone()

    def _capture(self, inputs: StepInputs) -> None:
        before = {name: tensor.clone() for name, tensor in self._state.tensors().items()}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._step(inputs)
        torch.cuda.current_stream().wait_stream(side)
        for name, tensor in self._state.tensors().items():
            # An optimiser that has not stepped yet has no state: it starts from zeroes.
            tensor.copy_(before[name]) if name in before else tensor.zero_()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = self._step(inputs)
