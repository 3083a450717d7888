"""One training step: Algorithm 1 of Arjovsky et al. 2017, "Wasserstein GAN" (arXiv 1701.07875), for every objective.

`Step.__call__` follows the paper line by line: n_critic updates of the critic, then one of the generator. Its lines are
named in the comments. The moving average of the generator is ours.

The file does not know how many processes there are: every loss is a mean and gradients are averaged over the ranks, so
all ranks take the same update. Nothing in it waits for the device, and the step's number reaches it through
`StepInputs` alone. Both are needed for CUDA to replay a step as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config, TrainingConfig
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.process import Runtime
from pipeline.models.networks import Generator, StepGenerator
from pipeline.models.objectives import (
    AnyObjective,
    Objective,
    gradient_penalty,
    scores_and_logits,
    squared_slopes,
    with_class_loss,
)
from pipeline.models.spectral_norm import follow_update
from pipeline.training.augment import augment
from pipeline.training.inputs import Images, StepFunction, StepInputs, Values
from pipeline.training.state import TrainingState

LossAndReport = tuple[Tensor, Tensor]
"""The loss () of a micro-batch with its graph, and detached values of it for the log."""


@dataclass
class Step:
    """Takes one training step, in place, each time it is called.

    A rank takes its rows of every batch in `micro_batches` equal parts, one after the other. There is usually one.
    """

    training: TrainingConfig
    objective: AnyObjective
    state: TrainingState
    critic: nn.Module
    """The state's critic; wrapped by DDP, which averages gradients during the backward pass, where there are several
    ranks and one micro-batch."""
    generator: Callable[..., tuple[list[Tensor], Iterable[Tensor]]]
    """Makes all images of a step: a `StepGenerator`, wrapped likewise, or an `AccumulatingGenerator`."""
    micro_batches: int = 1
    ranks: Ranks = Ranks()
    """The ranks that average their gradients after the last of several micro-batches."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Takes the step and returns its losses (3,), detached: the real and the fake loss as means over the critic's
        updates, and the generator's loss."""
        state, losses = self.state, []
        # Lines 4 and 9, and g_theta(z) of lines 5 and 10. The generator does not change before line 11, so the images
        # of all iterations are made in one call: fewer launches, and one all-reduce a batch norm instead of n_critic.
        latents = inputs.critic_latents, inputs.critic_labels, inputs.generator_latents, inputs.generator_labels
        fake, images = self.generator(*latents)
        real = inputs.real.to(inputs.generator_latents.dtype) / 255  # line 3
        if inputs.critic_augmentation is not None:
            real_draws, fake_draws = inputs.critic_augmentation.unbind(1)
            policies = self.training.diff_augment
            real = augment(real, real_draws, policies)
            fake = [*augment(torch.stack(fake), fake_draws[: len(fake)], policies)]
        for t in range(len(fake)):  # line 2: n_critic iterations, or as many as a burn-in has
            set_rates(state.critic_optimizer, t, inputs.critic_rates, inputs.critic_beta2)
            mix = None if inputs.mix is None else inputs.mix[t]
            real_images, fake_images = Images(real[t], inputs.real_labels[t]), Images(fake[t], inputs.critic_labels[t])
            losses.append(self.update_critic(real_images, fake_images, mix, inputs.penalty_factors[0]))  # lines 5 to 7
        set_rates(state.generator_optimizer, 0, inputs.generator_rates, inputs.generator_beta2)
        # The generator's pairs take a real batch that the critic was not updated on.
        others = Images(real[-1], inputs.real_labels[-1]) if self.objective.paired else None
        draws = inputs.generator_augmentation
        generator_loss = self.update_generator(images, inputs.generator_labels, draws, others)
        state.update_ema(inputs.ema_weights[0])
        return torch.cat([torch.stack(losses).mean(0), generator_loss.view(1)])

    def update_critic(
        self, real: Images, fake: Images, mix: Tensor | None, penalty_factor: float | Tensor = 1.0
    ) -> Tensor:
        """Takes lines 5 to 7: one update on both losses together (the paper), or one on each in turn (the notebook).

        Args:
            mix: (b,) in [0, 1], where between fake and real images a gradient penalty is taken; None: nowhere.
            penalty_factor: factor of the weights of all penalties.

        Returns:
            (2,), detached: the real and the fake loss, each before the update that it leads to.
        """
        state, training, objective, parts = self.state, self.training, self.objective, self.micro_batches
        optimizer = state.critic_optimizer
        if training.critic_updates == "joint":
            batches = zip(real.chunk(parts), fake.chunk(parts), self.chunk(mix), strict=True)
            losses = self.update(optimizer, (self.critic_loss(*batch, penalty_factor) for batch in batches))
        else:
            assert isinstance(objective, Objective), "checks refuse separate updates of pairs"
            real_losses = (self.side_loss(batch, objective.real_loss) for batch in real.chunk(parts))
            real_loss = self.update(optimizer, real_losses)
            if training.spectral_norm:
                follow_update(state.critic)  # before the next forward pass, which divides by the new weights' norms
            fake_losses = (self.side_loss(batch, objective.fake_loss) for batch in fake.chunk(parts))
            losses = torch.stack([real_loss, self.update(optimizer, fake_losses)])
        clip_(state.critic, training.clip_value)  # line 7
        if training.spectral_norm:
            follow_update(state.critic)
        return losses

    def update_generator(
        self, images: Iterable[Tensor], labels: Tensor, draws: Tensor | None = None, others: Images | None = None
    ) -> Tensor:
        """Takes lines 10 and 11: one update of the generator through the critic.

        The critic is frozen, which spares the gradients of its weights, half of its backward pass. So its bare module
        is used: a wrapper would have nothing to average.

        Args:
            images: the micro-batches of the generator's images (b, C, H, W), with their graph.
            draws: (b, AUGMENTATION_DRAWS) of their augmentation; None: they are scored as they are.
            others: real images (b, C, H, W) as the critic sees them, for a paired objective.

        Returns:
            (), the detached loss before the update.
        """
        # `images` comes first: zip asks it once more than there are micro-batches, and on that call an
        # AccumulatingGenerator ends its backward pass.
        batches = zip(images, self.chunk(labels), self.chunk(draws), self.chunk(others), strict=True)
        self.state.critic.requires_grad_(False)
        loss = self.update(self.state.generator_optimizer, (self.generator_loss(*batch) for batch in batches))
        self.state.critic.requires_grad_(True)
        return loss

    def update(self, optimizer: torch.optim.Optimizer, losses: Iterable[LossAndReport]) -> Tensor:
        """Takes one step of the optimiser down the mean of the micro-batches' losses (line 6 or 11).

        The losses are computed one by one as they are asked for: the backward pass of a micro-batch frees its graph
        before the next is built. That is the memory that micro-batches save.

        Returns:
            The mean of the reported values over the micro-batches.
        """
        scaler, reports = self.state.scaler, []
        optimizer.zero_grad()
        for loss, report in losses:
            mean_loss = loss if self.micro_batches == 1 else loss / self.micro_batches
            torch.autograd.backward(scaler.scale(mean_loss))  # DDP averages over the ranks meanwhile
            reports.append(report)
        if self.micro_batches > 1:
            average_gradients(optimizer, self.ranks)
        scaler.step(optimizer)  # under fp16 it unscales the gradients, and skips the step if one is infinite
        scaler.update()
        return reports[0] if self.micro_batches == 1 else torch.stack(reports).mean(0)

    # -- the losses of one micro-batch ---------------------------------------------------------------------------------

    def critic_loss(
        self, real: Images, fake: Images, mix: Tensor | None, penalty_factor: float | Tensor
    ) -> LossAndReport:
        """Returns the critic's loss of a joint update, penalties included, and its real and fake part (2,).

        The paper ascends f(real) - f(fake); `real_loss` + `fake_loss` is its negative, which is descended.
        """
        training, objective = self.training, self.objective
        batch = [real.pixels, fake.pixels]
        # By their places in the batch: R1 is taken at the real images, R2 at the fake ones.
        weights = {side: gamma for side, gamma in enumerate((training.r1_penalty, training.r2_penalty)) if gamma}
        leaves = [batch[side].requires_grad_() for side in weights]
        if mix is not None:
            batch.append(torch.lerp(fake.pixels, real.pixels, mix.view(-1, 1, 1, 1)).requires_grad_())
        # One forward pass of two or three times the batch fills the matrix units better than one for each part, and
        # takes half the launches and all-reduces. A score depends on its image and its class alone, so it is the same.
        seen = Images(torch.cat(batch), torch.cat([real.labels, fake.labels]))
        scores, logits = scores_and_logits(objective, self.critic, *seen)
        real_scores, fake_scores, *between_scores = by_side = scores.chunk(len(batch))
        real_logits, fake_logits = (None, None) if logits is None else logits.chunk(len(batch))[:2]
        real_loss, fake_loss = objective.critic_losses(real_scores, fake_scores)
        real_loss = with_class_loss(real_loss, real_logits, real.labels)
        fake_loss = with_class_loss(fake_loss, fake_logits, fake.labels)
        loss = real_loss + fake_loss
        if objective.joint_weight != 1:
            loss = objective.joint_weight * loss
        if training.gradient_penalty is not None:
            loss = loss + penalty_factor * training.gradient_penalty * gradient_penalty(between_scores[0], batch[2])
        if weights:
            slopes = squared_slopes([by_side[side] for side in weights], leaves)
            for gamma, slope in zip(weights.values(), slopes, strict=True):
                loss = loss + penalty_factor * gamma / 2 * slope
        return loss, torch.stack([real_loss.detach(), fake_loss.detach()])

    def side_loss(self, images: Images, loss_of: Callable[[Tensor], Tensor]) -> LossAndReport:
        """Returns the critic's loss on real or on fake images alone, for a separate update."""
        scores, logits = scores_and_logits(self.objective, self.critic, *images)
        loss = with_class_loss(loss_of(scores), logits, images.labels)
        return loss, loss.detach()

    def generator_loss(
        self, images: Tensor, labels: Tensor, draws: Tensor | None, others: Images | None
    ) -> LossAndReport:
        """Returns the generator's loss on a micro-batch of its images, paired with `others` if there are any."""
        seen = images if draws is None else augment(images, draws, self.training.diff_augment)
        scores, logits = scores_and_logits(self.objective, self.state.critic, seen, labels)
        pairs = [scores]
        if others is not None:
            with torch.no_grad():  # nothing that the generator could change is in them
                pairs.append(scores_and_logits(self.objective, self.state.critic, *others)[0])
        loss = with_class_loss(self.objective.generator_loss(*pairs), logits, labels)
        return loss, loss.detach()

    def chunk(self, values: Tensor | Images | None) -> tuple[Any, ...]:
        """Cuts a batch of values, or None, into its micro-batches."""
        return (None,) * self.micro_batches if values is None else tuple(values.chunk(self.micro_batches))


def set_rates(optimizer: torch.optim.Optimizer, index: int, rates: Values, beta2: Values | None) -> None:
    """Gives an optimiser the learning rate of an update and, where it changes, Adam's second decay rate."""
    group = optimizer.param_groups[0]
    group["lr"] = rates[index]
    if beta2 is not None:
        group["betas"] = group["betas"][0], beta2[index]


@torch.no_grad()
def clip_(network: nn.Module, clip_value: float | None) -> None:
    """Clips every parameter to [-clip_value, clip_value] in place, in two launches; None: not at all."""
    if clip_value is not None:
        parameters: list[Tensor] = list(network.parameters())
        torch._foreach_clamp_min_(parameters, -clip_value)
        torch._foreach_clamp_max_(parameters, clip_value)


def average_gradients(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Replaces the gradients of an optimiser's parameters by their means over the ranks, in one collective.

    With micro-batches networks are not wrapped by DDP, which would average after each of them.
    """
    if ranks.world_size > 1:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        means = ranks.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, torch.split(means, sizes), strict=True):
            gradient.copy_(mean.view(gradient.shape))


def build_step(config: Config, objective: AnyObjective, state: TrainingState, runtime: Runtime) -> StepFunction:
    """Builds the function that takes one step of `state`, for these settings, ranks and device."""
    training, ranks, parts = config.training, runtime.ranks, config.runtime.accumulation
    by_batch = training.critic_fakes == "batch"
    if parts > 1:
        from pipeline.training.image_makers import AccumulatingGenerator

        assert isinstance(state.generator, Generator), "checks refuse a user's network here: its layers are not known"
        critic = runtime.wrap(state.critic, data_parallel=False)
        images = AccumulatingGenerator(state.generator, parts, by_batch, ranks, runtime.autocast)
        step = Step(training, objective, state, critic, images, parts, ranks)
    else:
        if ranks.world_size > 1:
            from pipeline.distributed.batch_norm import convert_batch_norm

            convert_batch_norm(state.generator)
            convert_batch_norm(state.critic)  # the reference's has none, a user's may
        # Layer by layer there are fewer collectives and launches; a CPU alone prefers what its caches hold.
        pays = ranks.world_size > 1 or runtime.device.type == "cuda"
        generator = StepGenerator(state.generator, by_batch)
        if pays and by_batch and isinstance(state.generator, Generator):
            from pipeline.training.image_makers import LayerwiseStepGenerator

            generator = LayerwiseStepGenerator(state.generator, by_batch)
        step = Step(training, objective, state, runtime.wrap(state.critic), runtime.wrap(generator))
    if runtime.capture_stream is not None:
        from pipeline.training.cuda_graph import CapturedStep

        return CapturedStep(step, state, runtime)
    return step
