"""What critic and generator minimise: losses as pure functions of scores, chosen once by name, and penalties.

Scores are (n,) tensors of the critic's unbounded outputs. Every loss is a mean over the batch, so the mean of the
losses of equal slices, of ranks or of micro-batches, is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import TrainingConfig, import_object
from pipeline.errors import UserError

ScoreLoss = Callable[[Tensor], Tensor]
"""Takes scores (n,) to a loss ()."""


@dataclass(frozen=True)
class Objective:
    """The losses of a GAN, and what else distinguishes it from others."""

    real_loss: ScoreLoss
    """The critic's loss on real scores."""
    fake_loss: ScoreLoss
    """The critic's loss on fake scores."""
    generator_loss: ScoreLoss
    """The generator's loss on fake scores."""
    joint_weight: float = 1.0
    """Factor of real_loss + fake_loss in a joint update (0.5 where the paper averages over both)."""
    clips: bool = False
    """Whether the critic's parameters must be clipped (training.clip_value), or its weights normalised
    (training.spectral_norm)."""
    penalises: bool = False
    """Whether a gradient penalty is added (training.gradient_penalty)."""
    estimates_wasserstein: bool = False
    """Whether -(real_loss + fake_loss) estimates the Wasserstein-1 distance, up to the critic's Lipschitz constant."""
    classifies: bool = False
    """Whether the critic also predicts the class; generator and critic then both minimise its cross-entropy."""


def _towards(target: float) -> ScoreLoss:
    def squared_error(scores: Tensor) -> Tensor:
        return (scores - target).square().mean()

    return squared_error


def _is_real(scores: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against 1."""
    return F.softplus(-scores).mean()


def _is_fake(scores: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against 0."""
    return F.softplus(scores).mean()


def _negative_mean(scores: Tensor) -> Tensor:
    return -scores.mean()


OBJECTIVES: dict[str, Objective] = {
    # Arjovsky et al. 2017 (1701.07875), Algorithm 1.
    "wgan": Objective(_negative_mean, torch.mean, _negative_mean, clips=True, estimates_wasserstein=True),
    # Gulrajani et al. 2017 (1704.00028), Algorithm 1.
    "wgan_gp": Objective(_negative_mean, torch.mean, _negative_mean, penalises=True, estimates_wasserstein=True),
    # Mao et al. 2017 (1611.04076), eq. 9 with a = 0, b = c = 1.
    "lsgan": Objective(_towards(1.0), _towards(0.0), _towards(1.0), joint_weight=0.5),
    # Goodfellow et al. 2014 (1406.2661), Algorithm 1 with the non-saturating generator loss of section 3.
    "gan": Objective(_is_real, _is_fake, _is_real, joint_weight=0.5),
    # Odena et al. 2017 (1610.09585), eqs. 2 and 3.
    "acgan": Objective(_is_real, _is_fake, _is_real, joint_weight=0.5, classifies=True),
    # The class losses of these equations beside the losses of "wgan".
    "acwgan": Objective(_negative_mean, torch.mean, _negative_mean, clips=True, classifies=True),
}


def gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """Returns mean((||d score / d image||_2 - 1)^2), the penalty of Gulrajani et al. 2017, eq. 3, without its weight.

    Args:
        scores: (n,) critic scores of `images`, with their graph.
        images: (n, C, H, W), a leaf that requires grad.
    """
    (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    penalty: Tensor = (norms - 1).square().mean()
    return penalty


def r1_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """Returns mean(||d score / d image||_2^2), the penalty of Mescheder et al. 2018, eq. 9, without its weight
    gamma / 2.

    Args:
        scores: (n,) critic scores of real images, with their graph.
        images: (n, C, H, W), those images, a leaf that requires grad.
    """
    (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradients.square().flatten(1).sum(1).mean()


def with_class_loss(loss: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
    """Adds the cross-entropy of the class head to a loss, if there is one: logits (n, num_classes), labels int64
    (n,)."""
    return loss if logits is None else loss + F.cross_entropy(logits, labels)


def choose(training: TrainingConfig) -> Objective:
    """Returns the objective that the configuration names.

    Raises:
        UserError: the name is unknown, or another key contradicts it.
    """
    name = training.objective
    objective = import_object("training.objective", name) if ":" in name else OBJECTIVES.get(name)
    if objective is None:
        raise UserError(
            f"training.objective is {name!r}: choose one of {', '.join(OBJECTIVES)}, or give module:NAME of your own"
        )
    if not isinstance(objective, Objective):
        raise UserError(f"training.objective is {name!r}: that is a {type(objective).__name__}, not an Objective")
    for wanted, key in ((objective.clips, "clip_value"), (objective.penalises, "gradient_penalty")):
        value = getattr(training, key)
        if wanted and value is None and not (key == "clip_value" and training.spectral_norm):
            raise UserError(f"training.{key} is null: the objective {name} needs a number")
        if not wanted and value is not None:
            raise UserError(f"training.{key} is {value}: the objective {name} does not use it, set it to null")
    if (objective.penalises or training.r1_penalty is not None) and training.critic_updates == "separate":
        raise UserError("training.critic_updates is separate: a gradient penalty needs joint updates")
    return objective
