"""A step captured as one CUDA graph: one launch in the place of some hundreds."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.distributed.process import Runtime, on_stream
from pipeline.errors import UserError
from pipeline.training.inputs import StepFunction, StepInputs
from pipeline.training.state import TrainingState

WARM_UP_STEPS = 11
"""Before a capture: as many as DDP takes to settle."""


class CapturedStep:
    """The same step on inputs that stay where they are in memory; without a CUDA device it is run as it is.

    The first call warms up and captures, on the runtime's stream for it; the state is put back to what it was before.
    """

    def __init__(self, step: StepFunction, state: TrainingState, runtime: Runtime) -> None:
        self._step, self._state, self._stream = step, state, runtime.capture_stream
        self._inputs: StepInputs | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses = torch.empty(0)
        # NCCL does not end while a graph holds its collectives, so the graph goes first, after an error too.
        runtime.before_close.callback(self._reset)

    def __call__(self, inputs: StepInputs) -> Tensor:
        if self._inputs is None:
            self._inputs = inputs
            if self._stream is not None:
                self._capture(inputs)
        pairs = zip(inputs, self._inputs, strict=True)
        assert all(new is known for new, known in pairs if isinstance(new, Tensor)), "a graph reads where they were"
        if self._graph is None:
            return self._step(inputs)
        self._graph.replay()
        return self._losses.clone()

    def _capture(self, inputs: StepInputs) -> None:
        before = {name: tensor.clone() for name, tensor in self._state.tensors().items()}
        with on_stream(self._stream):
            for _ in range(WARM_UP_STEPS):
                self._step(inputs)
        for name, tensor in self._state.tensors().items():
            # An optimiser that has not stepped yet has no state: it starts from zeroes.
            tensor.copy_(before[name]) if name in before else tensor.zero_()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._losses = self._step(inputs)
        except torch.AcceleratorError as error:  # an objective of the user's that looks at a value on the host, say
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the step can't be captured as a CUDA graph ({reason}): set runtime.cuda_graph to false"
            ) from error

    def _reset(self) -> None:
        if self._graph is not None:
            self._graph.reset()
