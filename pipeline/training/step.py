"""One training step in full view: n_critic updates of the critic, one of the generator, one of the moving average.

Nothing here knows how many processes there are: networks wrapped for data parallelism average their gradients over the
ranks in the backward pass, and losses are means, so every rank takes the same update. Nothing waits for the device or
depends on the step's number but through `StepInputs`, so that on CUDA a step can be captured as a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import TrainingConfig
from pipeline.models.objectives import Objective, gradient_penalty, r1_penalty, with_class_loss
from pipeline.models.spectral_norm import follow_update
from pipeline.training.inputs import Images, StepInputs
from pipeline.training.state import TrainingState, clip_


@dataclass
class Step:
    """Updates a state in place."""

    training: TrainingConfig
    objective: Objective
    state: TrainingState
    critic: nn.Module
    """The state's own, maybe wrapped for data parallelism."""
    generator: nn.Module
    """A `StepGenerator` of the state's own, maybe wrapped."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Returns (3,) detached: real and fake loss, means over the critic's updates, and the generator's loss."""
        state, losses = self.state, []
        pixels, fakes, images = self.make_images(inputs)
        for index in range(len(pixels)):  # n_critic, or those of a burn-in
            real = Images(pixels[index], inputs.real_labels[index])
            fake = Images(fakes[index], inputs.critic_labels[index])
            state.critic_optimizer.param_groups[0]["lr"] = inputs.critic_rates[index]
            losses.append(self.update_critic(real, fake, None if inputs.mix is None else inputs.mix[index]))
        state.generator_optimizer.param_groups[0]["lr"] = inputs.generator_rates[0]
        generator_loss = self.update_generator(images, inputs.generator_labels)
        state.update_ema(inputs.ema_weights[0])
        return torch.cat([torch.stack(losses).mean(0), generator_loss.view(1)])

    def make_images(self, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Real and fake images, each (k, b, C, H, W), for the critic's updates, detached, and fake ones (b, C, H, W)
        for the generator's own: it does not change before that."""
        latents = inputs.critic_latents, inputs.critic_labels, inputs.generator_latents, inputs.generator_labels
        fakes, images = self.generator(*latents)
        return inputs.real.to(fakes.dtype) / 255, fakes, images

    def update_critic(self, real: Images, fake: Images, mix: Tensor | None) -> Tensor:
        """One update on both losses together (Algorithm 1) or one on each in turn (the notebook), then the clip.

        Returns (2,) detached: the real and the fake loss, each before the update of its own.
        """
        optimizer, scaler = self.state.critic_optimizer, self.state.scaler
        if self.training.critic_updates == "joint":
            loss, losses = self.joint_loss(real, fake, mix)
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
        else:
            separate: list[Tensor] = []
            for images, loss_of in ((real, self.objective.real_loss), (fake, self.objective.fake_loss)):
                if separate and self.training.spectral_norm:
                    follow_update(self.state.critic)  # by the first loss: it is not clipped yet
                scores, logits = self.critic(images.pixels)
                loss = with_class_loss(loss_of(scores), logits, images.labels)
                optimizer.zero_grad()
                torch.autograd.backward(scaler.scale(loss))
                scaler.step(optimizer)
                scaler.update()
                separate.append(loss.detach())
            losses = torch.stack(separate)
        clip_(self.state.critic, self.training.clip_value)
        if self.training.spectral_norm:
            follow_update(self.state.critic)
        return losses

    def joint_loss(self, real: Images, fake: Images, mix: Tensor | None) -> tuple[Tensor, Tensor]:
        """The critic's loss (), and (2,) detached: its real and its fake part. `mix` (n,) in [0, 1] is where between
        fake and real a gradient penalty is taken."""
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

    def update_generator(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update through the frozen critic, unwrapped: it wants no gradients, so nothing is to be all-reduced.

        Returns (), the detached loss before the update.
        """
        critic, optimizer, scaler = self.state.critic, self.state.generator_optimizer, self.state.scaler
        critic.requires_grad_(False)
        scores, logits = critic(images)
        loss = with_class_loss(self.objective.generator_loss(scores), logits, labels)
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        critic.requires_grad_(True)
        return loss.detach()
