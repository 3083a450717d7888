"""What one step takes from outside, drawn as a function of (seed, step): real images, latents, labels, rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import rng
from pipeline.config import Config, OptimizerConfig, TrainingConfig
from pipeline.data.source import Batch, Source
from pipeline.distributed.collectives import Ranks
from pipeline.errors import LocalError, UserError
from pipeline.training.state import TrainingState


class Images(NamedTuple):
    """A batch as the critic takes it: pixels float (n, C, H, W) in [0, 1], mirrored; labels int64 (n,)."""

    pixels: Tensor
    labels: Tensor


class StepInputs(NamedTuple):
    """One step's, for this rank, on the device. b: images of a rank; rates are tensors where the step is captured."""

    real: Tensor
    """uint8 (n_critic, b, C, H, W), mirrored."""
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


EMA_RAMP = 0.05
"""Longest half-life of the moving average, as a share of the images so far (Karras et al. 2020, 2006.06676)."""

StepFunction = Callable[[StepInputs], Tensor]
"""Takes one step; returns (3,) detached: real, fake and generator loss of this rank's images."""


class InputStream:
    """The inputs of one step after the other. The first is that of the state's step when it is asked for."""

    def __init__(self, config: Config, state: TrainingState, source: Source, ranks: Ranks) -> None:
        self._config, self._state, self._source = config, state, source
        self._rows = ranks.rows(config.training.batch_size)
        self._weight = state.generator.dense.weight
        share = self._rows.stop - self._rows.start
        self._no_labels = torch.zeros(share, dtype=torch.int64, device=self._weight.device)
        self._batches: Iterator[Batch] = iter(())
        self._next_batch = -1
        self.wait_seconds = 0.0
        """Spent waiting for real images, since whoever reads it set it to 0."""

    def take(self) -> StepInputs:
        """The inputs of the state's step.

        Raises:
            LocalError: real images could not be read.
        """
        training, step = self._config.training, self._state.step
        batch_size, latent_dim = training.batch_size, self._config.network.latent_dim
        indices = range(training.n_critic)
        first = step * training.n_critic
        images, labels = self._real_batches(first, training.n_critic)
        mix = None
        if training.gradient_penalty is not None:
            mix = torch.stack([self._draw(rng.penalty_mix, step, index, batch_size) for index in indices])
        return StepInputs(
            images,
            labels,
            torch.stack([self._draw(rng.critic_latents, step, index, batch_size, latent_dim) for index in indices]),
            torch.stack([self._draw_labels(rng.critic_labels, step, index) for index in indices]),
            mix,
            self._draw(rng.generator_latents, step, batch_size, latent_dim),
            self._draw_labels(rng.generator_labels, step),
            self._rates([learning_rate(training.critic_optimizer, first + index) for index in indices]),
            self._rates([learning_rate(training.generator_optimizer, step)]),
            self._rates([ema_weight(training, step)]),
        )

    def close(self) -> None:
        """Lets go of the source's workers and chunks."""
        self._batches, self._next_batch = iter(()), -1

    def _real_batches(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        started = time.monotonic()
        if first != self._next_batch:  # at the beginning, or after a resume
            self._batches = self._source.batches(first)
        try:
            images, labels = zip(*(next(self._batches) for _ in range(count)), strict=True)
        except UserError as error:
            raise LocalError(str(error)) from None
        self._next_batch = first + count
        self.wait_seconds += time.monotonic() - started
        return torch.stack(images), torch.stack(labels)

    def _draw(self, draw: Callable[..., Tensor], *arguments: int) -> Tensor:
        """This rank's rows of a global draw, on the device in the networks' dtype."""
        rows = draw(self._config.training.seed, *arguments, self._rows)
        return self._to_device(rows).to(self._weight.dtype)

    def _draw_labels(self, draw: Callable[..., Tensor], *counters: int) -> Tensor:
        """This rank's rows of a global draw of classes, on the device; without classes nobody reads them: all 0."""
        training, num_classes = self._config.training, self._state.generator.num_classes
        if not num_classes:
            return self._no_labels
        return self._to_device(draw(training.seed, *counters, training.batch_size, num_classes, self._rows))

    def _to_device(self, values: Tensor) -> Tensor:
        if self._weight.is_cuda:
            values = values.pin_memory()  # or the copy would wait for the device
        return values.to(self._weight.device, non_blocking=True)

    def _rates(self, values: list[float]) -> list[float] | Tensor:
        """A graph reads them from the device's memory."""
        return self._to_device(torch.tensor(values)) if self._config.runtime.cuda_graph else values


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Of an optimiser's update, counted from 0: inverse-time decay, as Keras has it, times warm-up and annealing."""
    rate = config.learning_rate / (1 + config.decay * update)
    if update < config.warm_up:
        rate *= (update + 1) / config.warm_up
    if config.annealing is not None:
        progress = min(1.0, update / config.annealing_updates)
        height = 1 - progress if config.annealing == "linear" else (1 + math.cos(math.pi * progress)) / 2
        rate *= config.annealing_floor + (1 - config.annealing_floor) * height
    return rate


def ema_weight(training: TrainingConfig, step: int) -> float:
    """How far the average moves at a step: 1 - decay, and more at first, so that early images are not those of the
    initial weights: decay is then (1 + step) / (10 + step), or that of a half-life of a share of the images so far."""
    if training.ema_half_life is None:
        return 1 - min(training.ema_decay, (1 + step) / (10 + step))
    half_life = min(training.ema_half_life, EMA_RAMP * step * training.batch_size)
    return 1 - 0.5 ** (training.batch_size / half_life) if step else 1.0
