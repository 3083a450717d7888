"""What critic and generator minimise: losses as pure functions of scores, chosen once by name, and penalties.

Scores are (n,) tensors of the critic's unbounded outputs. Every loss is a mean over the batch, or over the pairs of two
batches, so the mean of the losses of equal slices, of ranks or of micro-batches, is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import TrainingConfig, import_object
from pipeline.errors import UserError

ScoreLoss = Callable[[Tensor], Tensor]
"""Takes scores (n,) to a loss ()."""
PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes scores (n,) of two batches, of which rows i are a pair, to a loss ()."""


@dataclass(frozen=True)
class Objective:
    """The losses of a GAN, each of one batch's scores, and what else distinguishes it from others."""

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
    projects: bool = False
    """Whether an image is scored as one of its class (`projected`); generated images then have the classes of the real
    ones, row for row."""
    paired: ClassVar[bool] = False

    def critic_losses(self, real_scores: Tensor, fake_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the two losses whose sum, times `joint_weight`, the critic descends in a joint update."""
        return self.real_loss(real_scores), self.fake_loss(fake_scores)


@dataclass(frozen=True)
class PairedObjective:
    """The losses of a relativistic GAN, whose critic tells how much more real one image of a pair is than the other
    (Jolicoeur-Martineau 2018, 1807.00734).

    Row i of the real and of the fake batch are a pair, in the critic's updates and, with real images that the critic
    has not seen, in the generator's. Only means over pairs are the same for any number of ranks and micro-batches: a
    loss that compares with the mean score of the other batch (RaGAN) takes the mean of what a rank scores at once.
    """

    critic_loss: PairLoss
    """The critic's loss of (real scores, fake scores)."""
    generator_loss: PairLoss
    """The generator's loss of (fake scores, real scores)."""
    classifies: bool = False
    projects: bool = False
    """See `Objective`. With `projects` both images of a pair are of one class."""
    paired: ClassVar[bool] = True
    joint_weight: ClassVar[float] = 0.5
    clips: ClassVar[bool] = False
    penalises: ClassVar[bool] = False
    estimates_wasserstein: ClassVar[bool] = False

    def critic_losses(self, real_scores: Tensor, fake_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the critic's loss of the pairs for either side: what is logged, the mean of both, is this loss."""
        loss = self.critic_loss(real_scores, fake_scores)
        return loss, loss


def _is_real(scores: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against 1."""
    return F.softplus(-scores).mean()


def _is_fake(scores: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against 0."""
    return F.softplus(scores).mean()


def _negative_mean(scores: Tensor) -> Tensor:
    return -scores.mean()


def _is_more_real(scores: Tensor, others: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(score - other score) against 1."""
    return F.softplus(others - scores).mean()


def _is_one(scores: Tensor) -> Tensor:
    return (scores - 1).square().mean()


AnyObjective = Objective | PairedObjective
OBJECTIVES: dict[str, AnyObjective] = {
    # Arjovsky et al. 2017 (1701.07875), Algorithm 1.
    "wgan": Objective(_negative_mean, torch.mean, _negative_mean, clips=True, estimates_wasserstein=True),
    # Gulrajani et al. 2017 (1704.00028), Algorithm 1.
    "wgan_gp": Objective(_negative_mean, torch.mean, _negative_mean, penalises=True, estimates_wasserstein=True),
    # Mao et al. 2017 (1611.04076), eq. 9 with a = 0, b = c = 1.
    "lsgan": Objective(_is_one, lambda scores: scores.square().mean(), _is_one, joint_weight=0.5),
    # Goodfellow et al. 2014 (1406.2661), Algorithm 1 with the non-saturating generator loss of section 3.
    "gan": Objective(_is_real, _is_fake, _is_real, joint_weight=0.5),
    # Odena et al. 2017 (1610.09585), eqs. 2 and 3.
    "acgan": Objective(_is_real, _is_fake, _is_real, joint_weight=0.5, classifies=True),
    # The class losses of these equations beside the losses of "wgan".
    "acwgan": Objective(_negative_mean, torch.mean, _negative_mean, clips=True, classifies=True),
    # Jolicoeur-Martineau 2018 (1807.00734), RSGAN; Huang et al. 2024 (2501.05441), eq. 2.
    "rpgan": PairedObjective(_is_more_real, _is_more_real),
    # The same of pairs of one class, as R3GAN trains with classes; Miyato & Koyama 2018 (1802.05637), eq. 3.
    "crpgan": PairedObjective(_is_more_real, _is_more_real, projects=True),
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


def squared_slopes(scores: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    """Returns mean(||d score / d image||_2^2) of several batches: of real images this is R1 of Mescheder et al. 2018,
    eq. 9, of fake ones R2, without the weight gamma / 2. One backward pass serves all batches.

    Args:
        scores: (n,) of each batch, critic scores with their graph.
        images: (n, C, H, W) of each batch, leaves that require grad.
    """
    gradients = torch.autograd.grad([batch.sum() for batch in scores], images, create_graph=True)
    return [gradient.square().flatten(1).sum(1).mean() for gradient in gradients]


def projected(scores: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the scores (n,) of images as images of their classes: the critic of Miyato & Koyama 2018, eq. 3, whose
    inner product of features and the class's embedding is the class's logit.

    Args:
        scores: (n,), of the images whatever their class; logits: (n, num_classes); labels: int64 (n,).
    """
    return scores + logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def scores_and_logits(
    objective: AnyObjective, critic: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Returns the critic's scores (n,) of images (n, C, H, W) of classes `labels` (n,) and, where classes have a loss
    of their own, logits (n, k)."""
    scores, logits = critic(images)
    return (projected(scores, logits, labels), None) if objective.projects else (scores, logits)


def with_class_loss(loss: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
    """Adds the cross-entropy of the class head to a loss, if there is one: logits (n, num_classes), labels int64
    (n,)."""
    return loss if logits is None else loss + F.cross_entropy(logits, labels)


def is_conditional(objective: AnyObjective) -> bool:
    """Returns whether the networks are conditioned on the images' classes."""
    return objective.classifies or objective.projects


def penalises(training: TrainingConfig) -> bool:
    """Returns whether the critic's loss has a penalty."""
    return (training.gradient_penalty, training.r1_penalty, training.r2_penalty) != (None, None, None)


def choose(training: TrainingConfig) -> AnyObjective:
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
    if not isinstance(objective, AnyObjective):
        raise UserError(
            f"training.objective is {name!r}: that is a {type(objective).__name__}, not an Objective or PairedObjective"
        )
    if objective.projects and (objective.classifies or objective.penalises):
        raise UserError(
            f"training.objective is {name!r}: projects=True goes with neither classifies=True, which uses the class "
            "logits otherwise, nor penalises=True, since images between two classes have none"
        )
    for wanted, key in ((objective.clips, "clip_value"), (objective.penalises, "gradient_penalty")):
        value = getattr(training, key)
        if wanted and value is None and not (key == "clip_value" and training.spectral_norm):
            raise UserError(f"training.{key} is null: the objective {name} needs a number")
        if not wanted and value is not None:
            raise UserError(f"training.{key} is {value}: the objective {name} does not use it, set it to null")
    comparison = f"the objective {name} compares real with fake scores, which" if objective.paired else ""
    if training.critic_updates == "separate" and (comparison or penalises(training)):
        raise UserError(
            f"training.critic_updates is separate: {comparison or 'a gradient penalty'} needs joint updates"
        )
    if training.penalty_annealing is not None and not penalises(training):
        raise UserError(
            f"training.penalty_annealing is {training.penalty_annealing}: there is no penalty, set it to null"
        )
    return objective
