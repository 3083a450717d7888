"""What one step takes from outside, drawn as a function of (seed, step): real images, latents, labels, rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import rng
from pipeline.config import Config, OptimizerConfig, TrainingConfig
from pipeline.data import Batch, Source
from pipeline.distributed.collectives import Ranks
from pipeline.errors import LocalError, UserError
from pipeline.training.state import TrainingState


class Images(NamedTuple):
    """A batch as the critic takes it: pixels float (n, C, H, W) in [0, 1], mirrored; labels int64 (n,)."""

    pixels: Tensor
    labels: Tensor


class StepInputs(NamedTuple):
    """One step's, for this rank, on the device. k: its critic iterations; b: images of a rank; rates are tensors where
    the step is captured."""

    real: Tensor
    """uint8 (k, b, C, H, W), mirrored."""
    real_labels: Tensor
    """int64 (k, b)."""
    critic_latents: Tensor
    """(k, b, latent_dim)."""
    critic_labels: Tensor
    """int64 (k, b)."""
    mix: Tensor | None
    """(k, b), where there is a gradient penalty."""
    generator_latents: Tensor
    """(b, latent_dim)."""
    generator_labels: Tensor
    """int64 (b,)."""
    critic_rates: Sequence[float] | Tensor
    """(k,), learning rates."""
    generator_rates: Sequence[float] | Tensor
    """(1,)."""
    ema_weights: Sequence[float] | Tensor
    """(1,), how far the average moves towards the generator."""
    critic_augmentation: Tensor | None = None
    """(n_critic, 2, b, AUGMENTATION_DRAWS), of real and fake images, with DiffAugment."""
    generator_augmentation: Tensor | None = None
    """(b, AUGMENTATION_DRAWS), then too."""


EMA_RAMP = 0.05
"""Longest half-life of the moving average, as a share of the images so far (Karras et al. 2020, 2006.06676)."""

StepFunction = Callable[[StepInputs], Tensor]
"""Takes one step; returns (3,) detached: real, fake and generator loss of this rank's images."""


class InputStream:
    """The inputs of one step after the other. The first is that of the state's step when it is asked for.

    They lie in the same memory at every step of as many critic iterations, where a graph finds them. On a GPU nothing
    here waits for it: what is drawn goes there in one copy for each type of number, from pinned memory that is used
    again once the copy is done, so any number of steps may be under way.

    Args:
        captured: steps are captured as a graph, which reads rates from the device's memory too.
    """

    def __init__(self, config: Config, state: TrainingState, source: Source, ranks: Ranks, captured: bool) -> None:
        self._config, self._state, self._source, self._captured = config, state, source, captured
        self._rows = ranks.rows(config.training.batch_size)
        self._buffers: dict[int, _Buffers] = {}  # by the critic iterations of a step
        self._batches: Iterator[Batch] = iter(())
        self._next_batch = -1
        self.wait_seconds = 0.0
        """Spent waiting for real images, since whoever reads it set it to 0."""

    def take(self) -> StepInputs:
        """The inputs of the state's step, in the place of those before.

        Raises:
            LocalError: real images could not be read.
        """
        training, step, num_classes = self._config.training, self._state.step, self._state.generator.num_classes
        seed, rows, first = training.seed, self._rows, training.critic_iterations(0, step)
        latents = training.batch_size, self._config.network.latent_dim, rows
        labels = training.batch_size, num_classes, rows
        count = training.critic_iterations(step, step + 1)
        if count not in self._buffers:
            self._buffers[count] = self._make_buffers(count)
        buffers = self._buffers[count]
        self._take_real(first, buffers)
        numbers, classes = buffers.numbers.host, buffers.classes.host

        def fill(into: Tensor, draw: Callable[..., Tensor], *arguments: Any) -> None:
            """With a draw for each critic iteration."""
            torch.stack([draw(seed, step, index, *arguments) for index in range(count)], out=into)

        fill(numbers["critic_latents"], rng.critic_latents, *latents)
        if "mix" in numbers:
            fill(numbers["mix"], rng.penalty_mix, training.batch_size, rows)
        if "critic_augmentation" in numbers:
            fill(numbers["critic_augmentation"], rng.critic_augmentation, training.batch_size, rows)
            numbers["generator_augmentation"].copy_(rng.generator_augmentation(seed, step, training.batch_size, rows))
        numbers["generator_latents"].copy_(rng.generator_latents(seed, step, *latents))
        if num_classes:  # else nobody reads them
            fill(classes["critic_labels"], rng.critic_labels, *labels)
            classes["generator_labels"].copy_(rng.generator_labels(seed, step, *labels))
            buffers.classes.send()
        updates = range(first, first + count)
        rates = {
            "critic_rates": [learning_rate(training.critic_optimizer, update) for update in updates],
            "generator_rates": [learning_rate(training.generator_optimizer, step)],
            "ema_weights": [ema_weight(training, step)],
        }
        taken: dict[str, Any] = {"mix": None} | rates
        if buffers.rates is not None:
            for name, values in rates.items():
                buffers.rates.host[name].numpy()[:] = values
            buffers.rates.send()
            taken |= buffers.rates.device
        buffers.numbers.send()
        taken |= buffers.numbers.device | buffers.classes.device
        return StepInputs(real=buffers.real, real_labels=buffers.real_labels, **taken)

    def damage(self) -> str | None:
        """What has become of the real images in memory since they were read, in words; None: nothing."""
        return self._source.damage()

    def close(self) -> None:
        """Lets go of the source's workers and chunks."""
        self._batches, self._next_batch = iter(()), -1

    def _make_buffers(self, count: int) -> _Buffers:
        config, generator = self._config, self._state.generator
        weight, batches = next(generator.parameters()), (count, self._rows.stop - self._rows.start)
        numbers: dict[str, tuple[int, ...]] = {
            "critic_latents": (*batches, config.network.latent_dim),
            "generator_latents": (batches[1], config.network.latent_dim),
        }
        if config.training.gradient_penalty is not None:
            numbers["mix"] = batches
        if config.training.diff_augment:
            numbers["critic_augmentation"] = count, 2, batches[1], rng.AUGMENTATION_DRAWS
            numbers["generator_augmentation"] = batches[1], rng.AUGMENTATION_DRAWS
        rates: dict[str, tuple[int, ...]] = {}
        if self._captured:
            rates = {"critic_rates": (count,), "generator_rates": (1,), "ema_weights": (1,)}
        classes = {"critic_labels": batches, "generator_labels": batches[1:]}
        return _Buffers(
            _Packed(numbers, torch.float32, weight.device, weight.dtype),
            _Packed(rates, weight.dtype, weight.device, weight.dtype) if rates else None,
            _Packed(classes, torch.int64, weight.device, torch.int64),
            torch.empty(*batches, *generator.image_shape, dtype=torch.uint8, device=weight.device),
            torch.zeros(batches, dtype=torch.int64, device=weight.device),
        )

    def _take_real(self, first: int, buffers: _Buffers) -> None:
        started, count = time.monotonic(), len(buffers.real)
        if first != self._next_batch:  # at the beginning, or after a resume
            self._batches = self._source.batches(first)
        try:
            images, labels = zip(*(next(self._batches) for _ in range(count)), strict=True)
        except UserError as error:
            raise LocalError(str(error)) from None
        self._next_batch = first + count
        self.wait_seconds += time.monotonic() - started
        torch.stack(images, out=buffers.real)
        if self._state.generator.num_classes:
            torch.stack(labels, out=buffers.real_labels)


class _Buffers(NamedTuple):
    """Where the inputs of steps of so many critic iterations lie."""

    numbers: _Packed
    rates: _Packed | None
    """In the precision of the weights: float32 would change a float64 rate."""
    classes: _Packed
    real: Tensor
    real_labels: Tensor


class _Packed:
    """Named tensors side by side, on the host and on the device.

    Args:
        dtype: on the host.
        device_dtype: on the device.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, device_dtype: torch.dtype
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._host = torch.zeros(sum(sizes), dtype=dtype)
        self._device = self._host.to(device, device_dtype)  # on a CPU the same memory
        self.host, self.device = (
            {name: part.view(shapes[name]) for name, part in zip(shapes, torch.split(whole, sizes), strict=True)}
            for whole in (self._host, self._device)
        )

    def send(self) -> None:
        """Brings the host's values to the device without waiting for it."""
        if self._device is not self._host:
            # Pinned, or the copy would wait for the device.
            host = self._host.pin_memory() if self._device.is_cuda else self._host
            self._device.copy_(host, non_blocking=True)


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
