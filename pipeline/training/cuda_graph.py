"""A step captured as one CUDA graph: one launch instead of some hundreds, which a small network would wait for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.distributed.process import Runtime, on_stream
from pipeline.errors import UserError
from pipeline.training.inputs import StepFunction, StepInputs
from pipeline.training.state import TrainingState

WARM_UP_STEPS = 11
"""Steps before a capture. DDP takes as many until it does the same at each."""


class _Capture(NamedTuple):
    inputs: StepInputs
    graph: torch.cuda.CUDAGraph
    losses: Tensor
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    """The networks' parameters, each with the gradient that this graph writes."""


class CapturedStep:
    """The same step, replayed as a graph, on inputs that stay where they are in memory.

    The first step with each number of critic iterations (a burn-in has a graph of its own) is captured, on the
    runtime's stream for it.
    """

    def __init__(self, step: StepFunction, state: TrainingState, runtime: Runtime) -> None:
        self._step, self._state, self._stream = step, state, runtime.capture_stream
        self._captures: dict[int, _Capture] = {}  # by the number of critic iterations
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # NCCL does not end while a graph holds its collectives, so the graphs go first, after an error too.
        runtime.before_close.callback(self._reset)

    def __call__(self, inputs: StepInputs) -> Tensor:
        iterations = len(inputs.real)
        if iterations not in self._captures:
            self._captures[iterations] = self._capture(inputs)
        captured = self._captures[iterations]
        pairs = zip(inputs, captured.inputs, strict=True)
        assert all(new is known for new, known in pairs if isinstance(new, Tensor)), "a graph reads where they were"
        captured.graph.replay()
        for parameter, gradient in captured.gradients:
            parameter.grad = gradient  # for the log, which else would read what another graph has written
        return captured.losses.clone()  # the next replay overwrites them

    def _capture(self, inputs: StepInputs) -> _Capture:
        # A capture records launches and computes nothing. Warming up computes, so the state is put back after it.
        before = {name: tensor.clone() for name, tensor in self._state.tensors().items()}
        with on_stream(self._stream):
            for _ in range(WARM_UP_STEPS):
                self._step(inputs)
        for name, tensor in self._state.tensors().items():
            # An optimiser has no state before its first step, which starts from zeroes.
            tensor.copy_(before[name]) if name in before else tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        try:
            # "thread_local": another thread may wait for the device meanwhile, as the one that saves does.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                losses = self._step(inputs)
        except RuntimeError as error:  # for example a user's objective that reads a value on the host
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the step can't be captured as a CUDA graph ({reason}): set runtime.cuda_graph to false"
            ) from error
        networks = self._state.critic, self._state.generator
        gradients = [(parameter, parameter.grad) for network in networks for parameter in network.parameters()]
        return _Capture(inputs, graph, losses, gradients)

    def _reset(self) -> None:
        for graph in self._graphs:
            graph.reset()
