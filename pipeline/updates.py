"""One critic update and one generator update: forward, loss, backward, optimiser step, clip.

Nothing here knows how many processes there are: a critic or generator wrapped for data parallelism averages its
gradients over the ranks during `backward`, and the losses are means, so every rank then takes the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks import Critic, Generator, Statistics, update_moving_averages
from pipeline.objectives import Objective, ScoreLoss, gradient_penalty


class Images(NamedTuple):
    """A batch as the critic takes it: pixels float (n, C, H, W) in [0, 1], labels int64 (n,)."""

    pixels: Tensor
    labels: Tensor


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 in [0, 255] -> float in [0, 1]."""
    return images.to(dtype) / 255


@dataclass(frozen=True)
class Descent:
    """How a loss becomes a step of an optimiser.

    With `parts` > 1 a rank takes its slice of the batch in equal parts, one after the other, and averages their
    gradients: memory for one part, the trajectory of the whole to rounding. The critic and generator are bare modules
    then, and `sum_over_ranks` shares the gradients once a step.
    """

    scaler: torch.amp.GradScaler = torch.amp.GradScaler(enabled=False)
    """Scales losses up and gradients down again, where fp16 would lose them; disabled elsewhere."""
    parts: int = 1
    world_size: int = 1
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def slices(self, num_images: int) -> list[slice]:
        size = num_images // self.parts
        return [slice(start, start + size) for start in range(0, num_images, size)]

    def step(self, optimizer: torch.optim.Optimizer, losses: Iterable[Tensor]) -> None:
        """Zeroes the gradients, takes the losses of the parts one by one, and steps."""
        optimizer.zero_grad(set_to_none=True)
        for loss in losses:
            self.backward(loss)
        self.finish(optimizer)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self.scaler.scale(loss / self.parts))

    def finish(self, optimizer: torch.optim.Optimizer) -> None:
        if self.parts > 1 and self.world_size > 1:
            gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            means = torch.split(self.sum_over_ranks(flat) / self.world_size, [each.numel() for each in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view(gradient.shape))
        self.scaler.step(optimizer)
        self.scaler.update()


WHOLE = Descent()


def critic_step(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    real: Images,
    fake: Images,
    descent: Descent = WHOLE,
    *,
    separate: bool = False,
    clip_value: float | None = None,
    penalty_weight: float | None = None,
    mix: Tensor | None = None,
) -> Tensor:
    """Updates the critic once (twice when `separate`) and clips it.

    Args:
        separate: one update on the real loss, then one on the fake loss (the notebook's way).
        clip_value: every parameter ends in [-clip_value, clip_value].
        penalty_weight: weight of the gradient penalty at `mix * real + (1 - mix) * fake`.
        mix: (n,) in [0, 1], with `penalty_weight` only.

    Returns:
        (2,) detached: the loss on the real images and on the fake ones, both before the update of their own.
    """
    parts = descent.slices(len(real.pixels))
    found: list[Tensor] = []

    def losses(loss_of: ScoreLoss, images: Images) -> Iterator[Tensor]:
        for part in parts:
            scores, logits = critic(images.pixels[part])
            loss = loss_of(scores) + _class_loss(logits, images.labels[part])
            found.append(loss.detach())
            yield loss

    def joint_losses() -> Iterator[Tensor]:
        for part in parts:
            # One forward for everything: twice the batch for the matrix units, half the launches and all-reduces.
            batch = [real.pixels[part], fake.pixels[part]]
            if mix is not None:
                weights = mix[part].to(batch[0].dtype).view(-1, 1, 1, 1)
                batch.append(torch.lerp(batch[1], batch[0], weights).requires_grad_())
            scores, logits = critic(torch.cat(batch))
            real_scores, fake_scores, *between_scores = scores.chunk(len(batch))
            real_logits, fake_logits = (None, None) if logits is None else logits.chunk(len(batch))[:2]
            real_loss = objective.real_loss(real_scores) + _class_loss(real_logits, real.labels[part])
            fake_loss = objective.fake_loss(fake_scores) + _class_loss(fake_logits, fake.labels[part])
            found.append(torch.stack([real_loss.detach(), fake_loss.detach()]))
            total = objective.joint_weight * (real_loss + fake_loss)
            if penalty_weight is not None:
                total = total + penalty_weight * gradient_penalty(between_scores[0], batch[2])
            yield total

    if separate:
        descent.step(optimizer, losses(objective.real_loss, real))
        descent.step(optimizer, losses(objective.fake_loss, fake))
    else:
        descent.step(optimizer, joint_losses())
    if clip_value is not None:
        clip_(critic, clip_value)
    return torch.stack(found).view(2, -1).mean(1) if separate else torch.stack(found).mean(0)


def generator_step(
    generator: nn.Module,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    latents: Tensor,
    labels: Tensor,
    descent: Descent = WHOLE,
) -> Tensor:
    """Updates the generator once, the critic's parameters frozen.

    Args:
        critic: the bare module: none of its gradients are wanted, so there is nothing to all-reduce.
        latents: (n, latent_dim) in [-1, 1].
        labels: (n,) int64, the classes asked for (ignored without a class head).

    Returns:
        (), the detached loss before the update.
    """

    def loss_of(images: Tensor, part: slice) -> Tensor:
        scores, logits = critic(images)
        return objective.generator_loss(scores) + _class_loss(logits, labels[part])

    critic.requires_grad_(False)
    if descent.parts == 1:
        loss = loss_of(generator(latents, labels), slice(None))
        descent.step(optimizer, [loss])
        loss = loss.detach()
    else:
        assert isinstance(generator, Generator)
        optimizer.zero_grad(set_to_none=True)
        loss = backward_in_parts(generator, latents, labels, loss_of, descent)
        descent.finish(optimizer)
    critic.requires_grad_(True)
    return loss


# -- a generator with batch norm, in parts -----------------------------------------------------------------------------


@torch.no_grad()
def measure_statistics(generator: Generator, latents: Tensor, labels: Tensor, descent: Descent) -> list[Statistics]:
    """Statistics of the global batch before each batch norm, and their update of the moving averages.

    One batch norm after the other: each is measured with the statistics of those before it in place.
    """
    statistics: list[Statistics] = []
    for depth, norm in enumerate(generator.norms):
        sums = torch.zeros((), dtype=torch.float64, device=latents.device)
        for part in descent.slices(len(latents)):
            values = generator(latents[part], labels[part], statistics, depth).double()
            moments = [values, values.square(), torch.ones_like(values)]
            sums = sums + torch.stack([moment.sum((0, 2, 3)) for moment in moments])
        total, squares, count = descent.sum_over_ranks(sums)
        mean = total / count
        found = (mean, squares / count - mean.square(), count)
        statistics.append(Statistics(*(value.to(latents.dtype) for value in found)))
        assert isinstance(norm, nn.BatchNorm2d)
        update_moving_averages(norm, statistics[-1])
    return statistics


def generate_in_parts(generator: Generator, latents: Tensor, labels: Tensor, descent: Descent) -> Tensor:
    """Images of a generator in training mode: (n, C, H, W), without a graph."""
    with torch.no_grad():
        statistics = measure_statistics(generator, latents, labels, descent)
        parts = descent.slices(len(latents))
        return torch.cat([generator(latents[part], labels[part], statistics) for part in parts])


def backward_in_parts(
    generator: Generator,
    latents: Tensor,
    labels: Tensor,
    loss_of: Callable[[Tensor, slice], Tensor],
    descent: Descent,
) -> Tensor:
    """Adds the gradients of the mean loss to the generator's parameters; returns that loss, ().

    Batch norm makes an image depend on its whole batch, so parts can't simply be averaged. The statistics are taken
    as inputs at first: a backward pass over each part gives the gradients of the parameters and of the statistics.
    Then, from the last batch norm to the first, those of the statistics are carried on to what they were taken from:
    d mean / d x = 1 / N and d variance / d x = 2 (x - mean) / N. It costs about three times the work of one part.
    """
    parts = descent.slices(len(latents))
    statistics = [
        Statistics(mean.requires_grad_(), variance.requires_grad_(), count)
        for mean, variance, count in measure_statistics(generator, latents, labels, descent)
    ]
    losses = []
    for part in parts:
        loss = loss_of(generator(latents[part], labels[part], statistics), part)
        losses.append(loss.detach())
        descent.backward(loss)
    for depth in reversed(range(len(statistics))):
        mean, variance, count = statistics[depth]
        assert mean.grad is not None
        assert variance.grad is not None
        wanted = descent.sum_over_ranks(torch.stack([mean.grad, variance.grad])) / count
        for_mean, for_variance = wanted[..., None, None]
        for part in parts:
            values = generator(latents[part], labels[part], statistics, depth)
            deviation = values.detach() - mean.detach()[:, None, None]
            torch.autograd.backward(values, for_mean + 2 * for_variance * deviation)
    return torch.stack(losses).mean()


@torch.no_grad()
def clip_(network: nn.Module, clip_value: float) -> None:
    """Clips every parameter to [-clip_value, clip_value] in place."""
    parameters: list[Tensor] = list(network.parameters())
    torch._foreach_clamp_min_(parameters, -clip_value)
    torch._foreach_clamp_max_(parameters, clip_value)


def _class_loss(logits: Tensor | None, labels: Tensor) -> Tensor | float:
    return 0.0 if logits is None else F.cross_entropy(logits, labels)
