"""What one step takes from outside, as a function of (seed, step): real images, latents, labels, learning rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pipeline import rng
from pipeline.config import Config, OptimizerConfig, TrainingConfig
from pipeline.data import Batch, Source
from pipeline.distributed.collectives import Ranks
from pipeline.errors import LocalError, UserError
from pipeline.models.objectives import choose

if TYPE_CHECKING:
    from pipeline.training.state import TrainingState


class Images(NamedTuple):
    """A batch as the critic takes it: pixels float (n, C, H, W) in [0, 1], mirrored; labels int64 (n,)."""

    pixels: Tensor
    labels: Tensor

    def chunk(self, count: int) -> Iterator[Images]:
        """Cuts the batch into `count` equal micro-batches."""
        return map(Images, self.pixels.chunk(count), self.labels.chunk(count))


Values = Sequence[float] | Tensor
"""Numbers that change from step to step: a tensor on the device where steps are captured."""


class StepInputs(NamedTuple):
    """The inputs of one step for one rank, on the device.

    k is the number of critic iterations, b a rank's share of the batch. Floats have the type of the weights, labels are
    int64.
    """

    real: Tensor  # uint8 (k, b, C, H, W), mirrored; k + 1 with a paired objective, whose generator has the last
    real_labels: Tensor  # as many
    critic_latents: Tensor  # (k, b, latent_dim)
    critic_labels: Tensor  # (k, b), of the critic's generated images; with `projects` those of the real ones
    mix: Tensor | None  # (k, b) in [0, 1], where the gradient penalty is taken; None without one
    generator_latents: Tensor  # (b, latent_dim)
    generator_labels: Tensor  # (b,)
    critic_rates: Values  # (k,), the critic's learning rates
    generator_rates: Values  # (1,), the generator's
    ema_weights: Values  # (1,), how far the moving average goes towards the generator
    critic_augmentation: Tensor | None = None  # (len(real), 2, b, AUGMENTATION_DRAWS): real and fake, with DiffAugment
    generator_augmentation: Tensor | None = None  # (b, AUGMENTATION_DRAWS), with DiffAugment
    penalty_factors: Values = (1.0,)  # (1,), of the weights of the critic's penalties
    critic_beta2: Values | None = None  # (k,), Adam's second decay rate, where it changes
    generator_beta2: Values | None = None  # (1,)


StepFunction = Callable[[StepInputs], Tensor]
"""Takes one step; returns (3,) detached: real, fake and generator loss of this rank's images."""
EMA_RAMP = 0.05
"""Longest half-life of the moving average, as a share of the images so far (Karras et al. 2020, 2006.06676)."""


class InputStream:
    """Draws and loads the inputs of one step after the other, from the state's step on.

    Steps with the same number of critic iterations find them in the same memory, which is where a CUDA graph reads
    them. On a GPU nothing here waits for the device, so any number of steps may be under way.

    Args:
        captured: steps are captured as a graph, which reads learning rates from the device's memory too.
    """

    def __init__(self, config: Config, state: TrainingState, source: Source, ranks: Ranks, captured: bool) -> None:
        self._config, self._state, self._source, self._captured = config, state, source, captured
        objective = choose(config.training)
        self._for_generator = int(objective.paired)  # batches of real images
        self._draws_labels = not objective.projects
        self._rows, self._weight = ranks.rows(config.training.batch_size), next(state.generator.parameters())
        self._buffers: dict[int, _Buffers] = {}  # by the number of critic iterations
        self._batches: Iterator[Batch] = iter(())
        self._next_batch = -1
        self.wait_seconds = 0.0
        """Time spent waiting for real images since the reader last set it to 0."""

    def take(self) -> StepInputs:
        """Returns the inputs of the state's step, in the memory of those before.

        Raises:
            LocalError: real images could not be read.
        """
        training, step = self._config.training, self._state.step
        first, count = training.critic_iterations(0, step), training.critic_iterations(step, step + 1)
        drawn = self._draw(step, count)
        rates: dict[str, Any] = {
            "ema_weights": [ema_weight(training, step)],
            "penalty_factors": [penalty_factor(training, step)],
        }
        for role, updates in (("critic", range(first, first + count)), ("generator", [step])):
            optimizer: OptimizerConfig = getattr(training, f"{role}_optimizer")
            rates[f"{role}_rates"] = [learning_rate(optimizer, update) for update in updates]
            if optimizer.final_beta2 is not None:
                rates[f"{role}_beta2"] = [beta2(optimizer, update) for update in updates]
        if self._captured:  # in the precision of the weights: float32 would change a float64 rate
            drawn |= {name: torch.tensor(values, dtype=self._weight.dtype) for name, values in rates.items()}
        if count not in self._buffers:
            real = count + self._for_generator, self._rows.stop - self._rows.start, *self._state.generator.image_shape
            self._buffers[count] = _Buffers(drawn, real, self._weight)
        buffers = self._buffers[count]
        self._take_real(first + step * self._for_generator, buffers)
        buffers.send(drawn)
        return StepInputs(**{"mix": None} | rates | buffers.tensors)

    def close(self) -> None:
        """Ends the source's workers and frees what they have read ahead."""
        self._batches, self._next_batch = iter(()), -1

    def _draw(self, step: int, count: int) -> dict[str, Tensor]:
        """Draws the random numbers of a step with `count` critic iterations: this rank's rows of the global batch."""
        training, num_classes, rows = self._config.training, self._state.generator.num_classes, self._rows
        seed, size = training.seed, training.batch_size

        def of_critic(draw: Callable[..., Tensor], *arguments: Any, more: int = 0) -> Tensor:
            """Stacks the draws of the critic's iterations, and of `more`."""
            return torch.stack([draw(seed, step, index, *arguments) for index in range(count + more)])

        def of_both(name: str, draw: Callable[..., Tensor], *arguments: Any, more: int = 0) -> dict[str, Tensor]:
            critic, generator = of_critic(draw, *arguments, more=more), draw(seed, step, None, *arguments)
            return {f"critic_{name}": critic, f"generator_{name}": generator}

        drawn = of_both("latents", rng.latents, size, self._config.network.latent_dim, rows)
        if training.gradient_penalty is not None:
            drawn["mix"] = of_critic(rng.penalty_mix, size, rows)
        if training.diff_augment:
            drawn |= of_both("augmentation", rng.augmentation, size, rows, more=self._for_generator)
        if num_classes and self._draws_labels:
            drawn |= of_both("labels", rng.labels, size, num_classes, rows)
        return drawn

    def _take_real(self, first: int, buffers: _Buffers) -> None:
        started, real = time.monotonic(), buffers.tensors["real"]
        if first != self._next_batch:  # at the beginning, or after a resume
            self._batches = self._source.batches(first)
        try:
            images, labels = zip(*(next(self._batches) for _ in range(len(real))), strict=True)
        except UserError as error:
            raise LocalError(str(error)) from None
        self._next_batch = first + len(real)
        self.wait_seconds += time.monotonic() - started
        torch.stack(images, out=real)
        if self._state.generator.num_classes:
            torch.stack(labels, out=buffers.tensors["real_labels"])


class _Buffers:
    """The memory of the inputs of steps with one number of critic iterations; `tensors` holds them by name.

    Numbers that are drawn as one type lie side by side, so that one copy brings all of them to the device. Labels that
    are not drawn are those of the real images; without classes all are the same zeros.

    Args:
        drawn: numbers of such a step.
        real: shape (k or k + 1, b, C, H, W) of its real images.
        weight: of a network, whose device and type the numbers take. Labels stay int64.
    """

    def __init__(self, drawn: dict[str, Tensor], real: tuple[int, ...], weight: Tensor) -> None:
        device, labels = weight.device, torch.zeros(real[:2], dtype=torch.int64, device=weight.device)
        self.tensors = {"real": torch.empty(real, dtype=torch.uint8, device=device), "real_labels": labels}
        self.tensors |= {"critic_labels": labels[: len(drawn["critic_latents"])], "generator_labels": labels[-1]}
        self._packed: dict[torch.dtype, Tensor] = {}
        for dtype in dict.fromkeys(values.dtype for values in drawn.values()):
            group = {name: values for name, values in drawn.items() if values.dtype == dtype}
            sizes = [values.numel() for values in group.values()]
            packed = torch.empty(sum(sizes), dtype=weight.dtype if dtype.is_floating_point else dtype, device=device)
            self._packed[dtype] = packed
            for name, part in zip(group, torch.split(packed, sizes), strict=True):
                self.tensors[name] = part.view(group[name].shape)

    def send(self, drawn: dict[str, Tensor]) -> None:
        """Copies a step's numbers to the device without waiting for it."""
        for dtype, packed in self._packed.items():
            host = torch.cat([values.flatten() for values in drawn.values() if values.dtype == dtype])
            # From memory that is not pinned, the copy would wait for the device.
            packed.copy_(host.pin_memory() if packed.is_cuda else host, non_blocking=True)


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Returns the rate of an optimiser's update, counted from 0: inverse-time decay, as in Keras, times warm-up and
    annealing."""
    rate = config.learning_rate / (1 + config.decay * update)
    if update < config.warm_up:
        rate *= (update + 1) / config.warm_up
    if config.annealing is not None:
        rate *= annealed(1.0, config.annealing_floor, update / config.annealing_updates, config.annealing)
    return rate


def beta2(config: OptimizerConfig, update: int) -> float:
    """Returns Adam's second decay rate in an optimiser's update, counted from 0."""
    first, last = config.betas[1], config.final_beta2
    return first if last is None else annealed(first, last, update / config.annealing_updates)


def penalty_factor(training: TrainingConfig, step: int) -> float:
    """Returns the factor of the weights of all penalties at a step: 1 unless they are annealed."""
    if training.penalty_annealing is None:
        return 1.0
    return annealed(1.0, training.penalty_floor, step / training.penalty_annealing)


def annealed(first: float, last: float, progress: float, shape: str = "cosine") -> float:
    """Returns the value on the way from `first`, at progress 0, to `last`, at progress 1 and later: along half a cosine
    (Loshchilov & Hutter 2017, 1608.03983, eq. 5) or a line."""
    progress = min(1.0, progress)
    height = 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return last + (first - last) * height


def ema_weight(training: TrainingConfig, step: int) -> float:
    """Returns how far the moving average goes towards the generator at a step: 1 - decay.

    At first it goes farther, so that early averages are not of the initial weights: the decay is at most
    (1 + step) / (10 + step), or that of a half-life of EMA_RAMP of the images so far.
    """
    if training.ema_half_life is None:
        return 1 - min(training.ema_decay, (1 + step) / (10 + step))
    half_life = min(training.ema_half_life, EMA_RAMP * step * training.batch_size)
    return 1 - 0.5 ** (training.batch_size / half_life) if step else 1.0
