"""The same training step written plainly, with which the pipeline's speed is compared.

It has Keras's orientation and paddings, by torch's layers in the default memory layout; real and fake images pass the
critic one after the other; parameters are clamped one by one; losses are read back after every update; optimisers and
DDP have their defaults. It computes the same numbers to rounding (a test compares them; but several ranks do not share
batch norm's statistics), so the two differ in speed alone.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import NetworkConfig, OptimizerConfig
from pipeline.data import open_source
from pipeline.errors import UserError
from pipeline.models.networks import KERNEL, LEAK, Critic, Generator, mirror_state
from pipeline.models.objectives import Objective, gradient_penalty, scores_and_logits, squared_slopes, with_class_loss
from pipeline.models.spectral_norm import follow_update, raw_weights, use_spectral_norm
from pipeline.rng import seeded
from pipeline.training.inputs import InputStream, StepInputs
from pipeline.training.step import set_rates
from pipeline.training.trainer import Trainer


class PlainGenerator(Generator):
    """The generator of a direct port: transposed convolutions whatever the stride, images the right way round."""

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__(config, image_shape, num_classes)
        for index, stride in enumerate(self.strides):
            layer = self.convolutions[index]
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            padding = 1 if stride == 2 else 2
            layer = nn.ConvTranspose2d(layer.in_channels, layer.out_channels, KERNEL, stride, padding)
            self.convolutions[index] = layer

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self.first_maps(latents, labels).contiguous()
        for norm, convolution, stride in zip(self.norms, self.convolutions, self.strides, strict=True):
            images = convolution(F.relu(norm(images)))
            if stride == 2:
                images = images[..., :-1, :-1]
        return torch.sigmoid(images)


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Returns how many zeros Keras's 'same' puts before and after an axis of `size`; the odd one goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + KERNEL - size, 0)
    return total // 2, total - total // 2


class PlainCritic(Critic):
    """The critic of a direct port: padded by hand, images the right way round."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        for layer, stride in zip(self.convolutions, self.strides, strict=True):
            assert isinstance(layer, nn.Conv2d)
            images = F.leaky_relu(images, LEAK)
            sides = [side for size in (images.shape[3], images.shape[2]) for side in same_padding(size, stride)]
            images = F.conv2d(F.pad(images, sides), layer.weight, layer.bias, stride)
        features = images.permute(0, 2, 3, 1).flatten(1)
        logits = None if self.classes is None else self.classes(features)
        return self.score(features).squeeze(1), logits


def plain_state(network: Generator | Critic) -> dict[str, Tensor]:
    """Returns the state dict of the plain network that computes the same, without spectral normalisation."""
    tensors = mirror_state(network, raw_weights(network.state_dict()))
    if isinstance(network, Generator):
        for index, stride in enumerate(network.strides):
            if stride == 1:  # a convolution; the transposed one that computes the same has the kernel turned round
                name = f"convolutions.{index}.weight"
                tensors[name] = tensors[name].flip(2, 3).transpose(0, 1)
    return tensors


class PlainTrainer:
    """Takes the steps that a trainer would take from its present weights and step, with new optimisers. It has networks
    and an input stream of its own, so the trainer may go on as well.

    Raises:
        UserError: the settings ask for augmentation or a user's network, which the plain step has not.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._config, self._objective, runtime = trainer.config, trainer.objective, trainer.runtime
        if trainer.config.training.diff_augment:
            raise UserError("training.diff_augment is set: the plain step has no augmentation, benchmark without it")
        # A copy that shares all but the step number, of which the inputs are a function.
        self._state = state = dataclasses.replace(trainer.state)
        source = open_source(trainer.config, trainer.dataset, runtime.ranks, runtime.device)
        self.inputs = InputStream(trainer.config, state, source, runtime.ranks, captured=False)
        if not isinstance(state.generator, Generator) or not isinstance(state.critic, Critic):
            raise UserError(
                "network.generator, network.critic: the plain port is of the reference's networks, leave yours out"
            )
        shapes = trainer.config.network, trainer.dataset.image_shape, state.generator.num_classes
        generator, self._bare_critic = PlainGenerator(*shapes), PlainCritic(*shapes)
        for network, original in ((generator, state.generator), (self._bare_critic, state.critic)):
            network.to(runtime.device, state.generator.dense.weight.dtype).load_state_dict(plain_state(original))
        training = trainer.config.training
        if training.spectral_norm:
            use_spectral_norm(self._bare_critic, seeded(training.seed, "singular vectors"))
        self.generator: nn.Module = generator
        self.critic: nn.Module = self._bare_critic
        if runtime.ranks.world_size > 1:
            self.generator, self.critic = map(DistributedDataParallel, (self.generator, self.critic))
        self._generator_optimizer = _optimizer(training.generator_optimizer, self.generator)
        self._critic_optimizer = _optimizer(training.critic_optimizer, self.critic)

    def take_step(self) -> tuple[float, float]:
        """Takes a step; returns this rank's critic loss (mean of real and fake losses and over iterations) and
        generator loss."""
        training, objective, inputs, losses = self._config.training, self._objective, self.inputs.take(), []
        for index, (latents, labels) in enumerate(zip(inputs.critic_latents, inputs.critic_labels, strict=True)):
            real, real_labels = self._real(inputs, index), inputs.real_labels[index]
            with torch.no_grad():
                self.generator.train(training.critic_fakes == "batch")
                fake = self.generator(latents, labels)
            set_rates(self._critic_optimizer, index, inputs.critic_rates, inputs.critic_beta2)
            real_scores, real_logits = scores_and_logits(objective, self.critic, real, real_labels)
            if training.critic_updates == "separate":
                assert isinstance(objective, Objective)
                real_loss = with_class_loss(objective.real_loss(real_scores), real_logits, real_labels)
                _update(self._critic_optimizer, real_loss)
                if training.spectral_norm:
                    follow_update(self._bare_critic)
            fake_scores, fake_logits = scores_and_logits(objective, self.critic, fake, labels)
            of_real, of_fake = objective.critic_losses(real_scores, fake_scores)
            real_loss = with_class_loss(of_real, real_logits, real_labels)
            fake_loss = with_class_loss(of_fake, fake_logits, labels)
            loss = objective.joint_weight * (real_loss + fake_loss)
            factor = float(inputs.penalty_factors[0])
            if inputs.mix is not None and training.gradient_penalty is not None:
                mix = inputs.mix[index].view(-1, 1, 1, 1)
                between = (mix * real + (1 - mix) * fake).requires_grad_()
                scores = self.critic(between.view_as(between))[0]  # no leaf: torch's counter of FLOPs takes none
                loss = loss + factor * training.gradient_penalty * gradient_penalty(scores, between)
            sides = (training.r1_penalty, real, real_labels), (training.r2_penalty, fake, labels)
            for weight, images, classes in sides:
                if weight is not None:
                    leaf = images.detach().requires_grad_()
                    [penalty] = squared_slopes(
                        [scores_and_logits(objective, self.critic, leaf.view_as(leaf), classes)[0]], [leaf]
                    )
                    loss = loss + factor * weight / 2 * penalty
            _update(self._critic_optimizer, fake_loss if training.critic_updates == "separate" else loss)
            if training.clip_value is not None:
                for parameter in self.critic.parameters():
                    parameter.data.clamp_(-training.clip_value, training.clip_value)
            if training.spectral_norm:
                follow_update(self._bare_critic)
            losses.append((real_loss.item() + fake_loss.item()) / 2)
        self.generator.train()
        set_rates(self._generator_optimizer, 0, inputs.generator_rates, inputs.generator_beta2)
        labels = inputs.generator_labels
        scores, logits = scores_and_logits(
            objective, self._bare_critic, self.generator(inputs.generator_latents, labels), labels
        )
        others = []
        if objective.paired:
            others = [
                scores_and_logits(objective, self._bare_critic, self._real(inputs, -1), inputs.real_labels[-1])[0]
            ]
        generator_loss = with_class_loss(objective.generator_loss(scores, *others), logits, labels)
        _update(self._generator_optimizer, generator_loss)
        self._state.step += 1
        return sum(losses) / len(losses), generator_loss.item()

    def _real(self, inputs: StepInputs, index: int) -> Tensor:
        # Flipping the bytes of a batch takes no time that could be measured.
        return inputs.real[index].flip(2, 3).to(inputs.critic_latents.dtype) / 255


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def _optimizer(config: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    if config.algorithm == "adam":
        return torch.optim.Adam(network.parameters(), config.learning_rate, config.betas, config.epsilon)
    return torch.optim.RMSprop(network.parameters(), config.learning_rate, config.rho, config.epsilon)
