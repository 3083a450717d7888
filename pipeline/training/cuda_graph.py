"""A step captured as one CUDA graph: one launch instead of some hundreds, which a small network would wait for; and an
optimiser for it, which takes all that changes from one step to the next from the device's memory."""

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
        self._step, self._state, self._runtime = step, state, runtime
        self._captures: dict[int, _Capture] = {}  # by the number of critic iterations

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
        stream = self._runtime.capture_stream
        with on_stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._step(inputs)
        for name, tensor in self._state.tensors().items():
            # An optimiser has no state before its first step, which starts from zeroes.
            tensor.copy_(before[name]) if name in before else tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        # NCCL does not end while a graph holds its collectives, so the graphs go first, after an error too.
        self._runtime.before_close.callback(graph.reset)
        try:
            # "thread_local": another thread may wait for the device meanwhile, as the one that saves does.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                losses = self._step(inputs)
        except RuntimeError as error:  # for example a user's objective that reads a value on the host
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the step can't be captured as a CUDA graph ({reason}): set runtime.cuda_graph to false"
            ) from error
        networks = self._state.critic, self._state.generator
        gradients = [(parameter, parameter.grad) for network in networks for parameter in network.parameters()]
        return _Capture(inputs, graph, losses, gradients)


class CapturableAdam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015, 1412.6980, Algorithm 1) whose second decay rate may be a tensor on the device. torch's
    reads it on the host, so that a graph would repeat the value of its capture."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step of all parameters that have a gradient. They have taken as many steps before."""
        [group] = self.param_groups
        weights = [weight for weight in group["params"] if weight.grad is not None]
        gradients, (beta1, beta2) = [weight.grad for weight in weights], group["betas"]
        for weight in weights:
            if not self.state[weight]:
                moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                self.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
        steps, means, squares = ([self.state[w][name] for w in weights] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_add_(squares, torch._foreach_mul(torch._foreach_mul(gradients, gradients), 1 - beta2))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2 ** steps[0]).sqrt())
        torch._foreach_add_(roots, group["eps"])
        changes = torch._foreach_div(means, roots)
        torch._foreach_mul_(changes, group["lr"] / (1 - beta1 ** steps[0]))
        torch._foreach_sub_(weights, changes)
