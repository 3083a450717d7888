"""One training step as a function of its inputs: n_critic critic updates, one generator update, one of the average.

Nothing in it waits for the device or depends on the step's number except through `StepInputs`, so on CUDA it can be
captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import TrainingConfig
from pipeline.objectives import Objective
from pipeline.state import TrainingState
from pipeline.updates import Descent, Images, critic_step, generate_in_parts, generator_step, to_pixels

WARM_UP_STEPS = 11
"""Before a capture: as many as DDP takes to settle."""


class StepInputs(NamedTuple):
    """What one step takes from outside, for this rank, on the device. b: images of a rank; numbers are tensors where
    the step is captured."""

    real: Tensor
    """uint8 (n_critic, b, C, H, W)."""
    real_labels: Tensor
    """int64 (n_critic, b)."""
    critic_latents: Tensor
    """(n_critic, b, latent_dim)."""
    critic_labels: Tensor
    """int64 (n_critic, b)."""
    mix: Tensor | None
    """(n_critic, b), where there is a gradient penalty."""
    generator_latents: Tensor
    """(b, latent_dim)."""
    generator_labels: Tensor
    """int64 (b,)."""
    critic_rates: Sequence[float] | Tensor
    """(n_critic,), learning rates."""
    generator_rates: Sequence[float] | Tensor
    """(1,)."""
    ema_weights: Sequence[float] | Tensor
    """(1,), how far the average moves towards the generator."""


class Step:
    """Updates a state in place.

    Args:
        critic, generator: the state's own, maybe wrapped for data parallelism.
    """

    def __init__(
        self,
        training: TrainingConfig,
        objective: Objective,
        state: TrainingState,
        critic: nn.Module,
        generator: nn.Module,
        descent: Descent,
    ) -> None:
        self.state = state
        self._training, self._objective, self._descent = training, objective, descent
        self._critic, self._generator = critic, generator

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Returns (3,) detached: real and fake loss, means over the critic updates, and the generator's loss."""
        training, state = self._training, self.state
        dtype = state.generator.dense.weight.dtype
        losses = []
        for index, fake in enumerate(self._fakes_for_critic(inputs)):
            _set_rate(state.critic_optimizer, inputs.critic_rates[index])
            losses.append(
                critic_step(
                    self._critic,
                    state.critic_optimizer,
                    self._objective,
                    Images(to_pixels(inputs.real[index], dtype), inputs.real_labels[index]),
                    fake,
                    self._descent,
                    separate=training.critic_updates == "separate",
                    clip_value=training.clip_value,
                    penalty_weight=training.gradient_penalty,
                    mix=None if inputs.mix is None else inputs.mix[index],
                )
            )
        _set_rate(state.generator_optimizer, inputs.generator_rates[0])
        state.generator.train()
        generator_loss = generator_step(
            self._generator,
            state.critic,
            state.generator_optimizer,
            self._objective,
            inputs.generator_latents,
            inputs.generator_labels,
            self._descent,
        )
        state.update_ema(inputs.ema_weights[0])
        return torch.cat([torch.stack(losses).mean(0), generator_loss.view(1)])

    @torch.no_grad()
    def _fakes_for_critic(self, inputs: StepInputs) -> Iterator[Images]:
        """The n_critic fake batches: the generator does not change between them."""
        generator, descent = self.state.generator, self._descent
        latents, labels = inputs.critic_latents, inputs.critic_labels
        batches, together = list(zip(latents, labels, strict=True)), (latents.flatten(0, 1), labels.flatten())
        generator.train(self._training.critic_fakes == "batch")
        if not generator.training:
            # An image does not depend on its batch: a GPU makes as many at once as it may, a CPU's caches prefer few.
            num_parts = descent.parts if latents.is_cuda else descent.parts * len(batches)
            parts = zip(*(values.chunk(num_parts) for values in together), strict=True)
            images = torch.cat([generator(*part) for part in parts])
        elif descent.parts > 1:
            images = torch.cat([generate_in_parts(generator, *batch, descent) for batch in batches])
        elif descent.world_size > 1:  # the batches share each layer's collective
            images = generator(*together, num_batches=len(batches))
        else:  # one after the other they make better use of caches
            images = torch.cat([generator(*batch) for batch in batches])
        return map(Images, images.chunk(len(batches)), labels)


class CapturedStep:
    """The same step through inputs that stay where they are in memory, and on CUDA captured as one graph: a launch in
    the place of some thousands.

    The first call warms up and captures; the state is put back to what it was before.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
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
        before = {name: tensor.clone() for name, tensor in self._step.state.tensors().items()}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._step(inputs)
        torch.cuda.current_stream().wait_stream(side)
        for name, tensor in self._step.state.tensors().items():
            # An optimiser that has not stepped yet has no state: it starts from zeroes.
            tensor.copy_(before[name]) if name in before else tensor.zero_()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses = self._step(inputs)


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float | Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
