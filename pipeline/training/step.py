"""One training step, as Algorithm 1 of Arjovsky et al. 2017 (arXiv 1701.07875) reads: n_critic updates of the critic,
then one of the generator. After it the generator's moving average follows.

The file does not know how many processes there are. Networks wrapped for data parallelism average their gradients over
the ranks in the backward pass, and every loss is a mean, so all ranks take the same update. Nothing here waits for the
device, and the step's number reaches it through `StepInputs` alone: that is what lets CUDA replay a step as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import TrainingConfig
from pipeline.models.objectives import Objective, ScoreLoss, gradient_penalty, r1_penalty, with_class_loss
from pipeline.models.spectral_norm import follow_update
from pipeline.training.augment import augment
from pipeline.training.inputs import Images, StepInputs
from pipeline.training.state import TrainingState, clip_

Optimizer = torch.optim.Optimizer


@dataclass
class Step:
    """Takes one training step, in place, each time it is called.

    A rank takes its rows of every batch in `micro_batches` equal pieces, one after the other; with 1, the usual case,
    the loops over them below run once.
    """

    training: TrainingConfig
    objective: Objective
    state: TrainingState
    critic: nn.Module
    """The state's critic, wrapped for data parallelism where there are several ranks and one micro-batch."""
    generator: Callable[..., tuple[Tensor, Iterable[Tensor]]]
    """Makes all images of a step: a `StepGenerator`, maybe wrapped, or with micro-batches an
    `AccumulatingGenerator`."""
    micro_batches: int = 1
    average_gradients: Callable[[Optimizer], None] = lambda _: None
    """Averages gradients over the ranks before an update, where no wrapper has done so during the backward pass."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Returns (3,) detached: real and fake loss, means over the critic's updates, and the generator's loss."""
        state, losses = self.state, []
        # The generator does not change before its own update at the end: all images of the step can be made here.
        latents = inputs.critic_latents, inputs.critic_labels, inputs.generator_latents, inputs.generator_labels
        fake, images = self.generator(*latents)
        real = inputs.real.to(fake.dtype) / 255
        if inputs.critic_augmentation is not None:
            real_draws, fake_draws = inputs.critic_augmentation.unbind(1)
            real, fake = self.augmented(real, real_draws), self.augmented(fake, fake_draws)
        for k in range(len(real)):  # n_critic, or as many as a burn-in has
            state.critic_optimizer.param_groups[0]["lr"] = inputs.critic_rates[k]
            sides = Images(real[k], inputs.real_labels[k]), Images(fake[k], inputs.critic_labels[k])
            losses.append(self.update_critic(*sides, None if inputs.mix is None else inputs.mix[k]))
        state.generator_optimizer.param_groups[0]["lr"] = inputs.generator_rates[0]
        generator_loss = self.update_generator(images, inputs.generator_labels, inputs.generator_augmentation)
        state.update_ema(inputs.ema_weights[0])
        return torch.cat([torch.stack(losses).mean(0), generator_loss.view(1)])

    def update_critic(self, real: Images, fake: Images, mix: Tensor | None) -> Tensor:
        """Updates the critic on both losses together (Algorithm 1) or on each in turn (the notebook), and clips it.

        Args:
            mix: (b,) in [0, 1], where between fake and real images a gradient penalty is taken; None: nowhere.

        Returns (2,) detached: the real and the fake loss, each before the update that it leads to.
        """
        optimizer = self.state.critic_optimizer
        if self.training.critic_updates == "joint":
            pieces = zip(self.pieces(real), self.pieces(fake), self.split(mix), strict=True)
            losses = self.update(optimizer, (self.critic_loss(*piece) for piece in pieces))
        else:
            real_loss = self.update(optimizer, self.losses_of_side(real, self.objective.real_loss))
            if self.training.spectral_norm:
                follow_update(
                    self.state.critic
                )  # the next forward pass divides by the norm of the weights that it uses
            losses = torch.stack(
                [real_loss, self.update(optimizer, self.losses_of_side(fake, self.objective.fake_loss))]
            )
        clip_(self.state.critic, self.training.clip_value)
        if self.training.spectral_norm:
            follow_update(self.state.critic)
        return losses

    def update_generator(self, images: Iterable[Tensor], labels: Tensor, draws: Tensor | None = None) -> Tensor:
        """Updates the generator through the frozen critic, whose bare module is used: it wants no gradients, so a
        wrapper would have nothing to average.

        Args:
            images: the micro-batches of the generator's images (b, C, H, W), attached to its graph.
            draws: (b, AUGMENTATION_DRAWS) of their augmentation; None: they are scored as they are.

        Returns (), the detached loss before the update.
        """
        critic = self.state.critic
        critic.requires_grad_(False)
        loss = self.update(self.state.generator_optimizer, self.generator_losses(images, labels, draws))
        critic.requires_grad_(True)
        return loss

    def update(self, optimizer: Optimizer, losses: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Takes one step of the optimiser down the mean of the micro-batches' losses.

        Args:
            losses: for each micro-batch the loss () to descend and detached values to report. It is consumed lazily:
            the
                backward pass frees the graph of one micro-batch before the next is computed.

        Returns the mean of the reported values over the micro-batches.
        """
        scaler, reports = self.state.scaler, []
        optimizer.zero_grad()
        for loss, report in losses:
            mean_loss = loss if self.micro_batches == 1 else loss / self.micro_batches
            torch.autograd.backward(scaler.scale(mean_loss))
            reports.append(report)
        self.average_gradients(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return reports[0] if self.micro_batches == 1 else torch.stack(reports).mean(0)

    # -- losses of one micro-batch -------------------------------------------------------------------------------------

    def critic_loss(self, real: Images, fake: Images, mix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes the critic's loss () of a joint update, penalties included, and (2,) its real and its fake part."""
        # One forward pass for everything: twice the batch for the matrix units, half the launches and all-reduces.
        r1_weight = self.training.r1_penalty
        batch = [real.pixels if r1_weight is None else real.pixels.requires_grad_(), fake.pixels]
        if mix is not None:
            batch.append(torch.lerp(fake.pixels, real.pixels, mix.view(-1, 1, 1, 1)).requires_grad_())
        scores, logits = self.critic(torch.cat(batch))
        real_scores, fake_scores, *between_scores = scores.chunk(len(batch))
        real_logits, fake_logits = (None, None) if logits is None else logits.chunk(len(batch))[:2]
        real_loss = with_class_loss(self.objective.real_loss(real_scores), real_logits, real.labels)
        fake_loss = with_class_loss(self.objective.fake_loss(fake_scores), fake_logits, fake.labels)
        loss = real_loss + fake_loss
        if self.objective.joint_weight != 1:
            loss = self.objective.joint_weight * loss
        if self.training.gradient_penalty is not None:
            loss = loss + self.training.gradient_penalty * gradient_penalty(between_scores[0], batch[2])
        if r1_weight is not None:
            loss = loss + r1_weight / 2 * r1_penalty(real_scores, batch[0])
        return loss, torch.stack([real_loss.detach(), fake_loss.detach()])

    def losses_of_side(self, images: Images, loss_of: ScoreLoss) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the critic's loss on real or on fake images alone, for a separate update."""
        for pixels, labels in self.pieces(images):
            scores, logits = self.critic(pixels)
            loss = with_class_loss(loss_of(scores), logits, labels)
            yield loss, loss.detach()

    def generator_losses(
        self, images: Iterable[Tensor], labels: Tensor, draws: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the generator's loss on each micro-batch of its images."""
        # `images` first: asked once more than there are micro-batches, it ends what the last backward pass has left.
        for pixels, classes, draw in zip(images, labels.chunk(self.micro_batches), self.split(draws), strict=True):
            scores, logits = self.state.critic(pixels if draw is None else self.augmented(pixels, draw))
            loss = with_class_loss(self.objective.generator_loss(scores), logits, classes)
            yield loss, loss.detach()

    # -- pieces of a batch ---------------------------------------------------------------------------------------------

    def augmented(self, images: Tensor, draws: Tensor) -> Tensor:
        """Returns images (..., C, H, W) as the critic sees them, each changed by its draws (...,
        AUGMENTATION_DRAWS)."""
        flat = augment(images.flatten(0, -4), draws.flatten(0, -2), self.training.diff_augment)
        return flat.reshape(images.shape)

    def split(self, values: Tensor | None) -> tuple[Tensor | None, ...]:
        """Cuts the rows of a batch into the micro-batches."""
        return (None,) * self.micro_batches if values is None else values.chunk(self.micro_batches)

    def pieces(self, images: Images) -> Iterator[Images]:
        """Yields the micro-batches of images with their labels."""
        return map(Images, images.pixels.chunk(self.micro_batches), images.labels.chunk(self.micro_batches))
