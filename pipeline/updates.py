"""One critic update and one generator update: forward, loss, backward, optimiser step, clip.

Nothing here knows how many processes there are: a critic or generator wrapped for data parallelism averages its
gradients over the ranks during `backward`, and the losses are means, so every rank then takes the same step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks import Critic
from pipeline.objectives import Objective, gradient_penalty


class Images(NamedTuple):
    """A batch as the critic takes it: pixels float (n, C, H, W) in [0, 1], labels int64 (n,)."""

    pixels: Tensor
    labels: Tensor


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 in [0, 255] -> float in [0, 1]."""
    return images.to(dtype) / 255


def critic_step(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    real: Images,
    fake: Images,
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
    if separate:
        losses = []
        for loss_of, images in ((objective.real_loss, real), (objective.fake_loss, fake)):
            scores, logits = critic(images.pixels)
            loss = loss_of(scores) + _class_loss(logits, images.labels)
            _descend(optimizer, loss)
            losses.append(loss)
        real_loss, fake_loss = losses
    else:
        # One forward for everything: twice the batch for the matrix units, half the launches and all-reduces.
        parts, sizes = [real.pixels, fake.pixels], [len(real.pixels), len(fake.pixels)]
        if penalty_weight is not None and mix is not None:
            weights = mix.to(real.pixels.dtype).view(-1, 1, 1, 1)
            between = torch.lerp(fake.pixels, real.pixels, weights).requires_grad_()
            parts.append(between)
        scores, logits = critic(torch.cat(parts))
        real_scores, fake_scores, *between_scores = scores.split([*sizes, *sizes[: len(parts) - 2]])
        real_logits, fake_logits = (None, None) if logits is None else logits[: sum(sizes)].split(sizes)
        real_loss = objective.real_loss(real_scores) + _class_loss(real_logits, real.labels)
        fake_loss = objective.fake_loss(fake_scores) + _class_loss(fake_logits, fake.labels)
        total = objective.joint_weight * (real_loss + fake_loss)
        if penalty_weight is not None and between_scores:
            total = total + penalty_weight * gradient_penalty(between_scores[0], between)
        _descend(optimizer, total)
    if clip_value is not None:
        clip_(critic, clip_value)
    return torch.stack([real_loss.detach(), fake_loss.detach()])


def generator_step(
    generator: nn.Module,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    latents: Tensor,
    labels: Tensor,
) -> Tensor:
    """Updates the generator once, the critic's parameters frozen.

    Args:
        critic: the bare module: none of its gradients are wanted, so there is nothing to all-reduce.
        latents: (n, latent_dim) in [-1, 1].
        labels: (n,) int64, the classes asked for (ignored without a class head).

    Returns:
        (), the detached loss before the update.
    """
    critic.requires_grad_(False)
    scores, logits = critic(generator(latents, labels))
    loss = objective.generator_loss(scores) + _class_loss(logits, labels)
    _descend(optimizer, loss)
    critic.requires_grad_(True)
    return loss.detach()


@torch.no_grad()
def clip_(network: nn.Module, clip_value: float) -> None:
    """Clips every parameter to [-clip_value, clip_value] in place."""
    parameters: list[Tensor] = list(network.parameters())
    torch._foreach_clamp_min_(parameters, -clip_value)
    torch._foreach_clamp_max_(parameters, clip_value)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()


def _class_loss(logits: Tensor | None, labels: Tensor) -> Tensor | float:
    return 0.0 if logits is None else F.cross_entropy(logits, labels)
