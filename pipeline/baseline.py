"""What the pipeline's speed is measured against: the same training step, written plainly, and torch-fidelity's scores.

Layers as Keras has them in torch's default layout; real and fake images pass the critic one after the other; parameters
are clamped one by one; losses are read back after every update; optimisers and DDP with their defaults. It computes
the same numbers to rounding (a test compares them; several ranks do not share batch norm's statistics), so the two
differ in speed alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch_fidelity
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pipeline import rng
from pipeline.config import OptimizerConfig
from pipeline.data import Batch
from pipeline.evaluation.features import MNIST_SHAPE, MnistFeatures
from pipeline.models.cpu_kernels import KERNEL
from pipeline.models.networks import CRITIC_STRIDES, LEAK, Critic, Generator
from pipeline.models.objectives import gradient_penalty
from pipeline.training.trainer import Trainer


class PlainGenerator(nn.Module):
    """A copy of a generator as a direct port has it: transposed convolutions whatever the stride."""

    def __init__(self, original: Generator) -> None:
        super().__init__()
        self.base, self.num_classes = original.base, original.num_classes
        self.dense = copy.deepcopy(original.dense)
        self.norms, self.convolutions = nn.ModuleList(), nn.ModuleList()
        for norm, convolution in zip(original.norms, original.convolutions, strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
            self.norms.append(nn.BatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum))
            weight, stride = convolution.weight.detach().contiguous(), 2
            if isinstance(convolution, nn.Conv2d):
                weight, stride = weight.flip(2, 3).transpose(0, 1), 1
            inputs, outputs = weight.shape[:2]
            plain = nn.ConvTranspose2d(inputs, outputs, KERNEL, stride, padding=1 if stride == 2 else 2)
            plain.load_state_dict({"weight": weight, "bias": convolution.bias})
            self.convolutions.append(plain)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        if self.num_classes:
            latents = torch.cat([latents, F.one_hot(labels, self.num_classes).to(latents.dtype)], dim=1)
        images: Tensor = self.dense(latents).unflatten(1, self.base).permute(0, 3, 1, 2).contiguous()
        for index, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
            images = convolution(F.relu(norm(images)))
            if index < 2:  # of stride 2
                images = images[..., :-1, :-1]
        return torch.sigmoid(images)


def same_padding(size: int, stride: int) -> tuple[int, int]:
    """Rows that Keras's 'same' puts before and after an axis of `size`; the odd one goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + KERNEL - size, 0)
    return total // 2, total - total // 2


class PlainCritic(nn.Module):
    """A copy of a critic as a direct port has it: padded by hand."""

    def __init__(self, original: Critic) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for convolution, stride in zip(original.convolutions, CRITIC_STRIDES, strict=True):
            assert isinstance(convolution, nn.Conv2d)
            plain = nn.Conv2d(convolution.in_channels, convolution.out_channels, KERNEL, stride)
            plain.load_state_dict(convolution.state_dict())
            self.convolutions.append(plain)
        self.score, self.classes = copy.deepcopy(original.score), copy.deepcopy(original.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        for convolution, stride in zip(self.convolutions, CRITIC_STRIDES, strict=True):
            images = F.leaky_relu(images, LEAK)
            sides = [side for size in (images.shape[3], images.shape[2]) for side in same_padding(size, stride)]
            images = convolution(F.pad(images, sides))
        features = images.permute(0, 2, 3, 1).flatten(1)
        logits = None if self.classes is None else self.classes(features)
        return self.score(features).squeeze(1), logits


class PlainTrainer:
    """Takes the steps that a trainer would take from its present state, on networks of its own."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        training, world_size = trainer.config.training, trainer.runtime.world_size
        weight = trainer.state.generator.dense.weight
        self.generator: nn.Module = PlainGenerator(trainer.state.generator).to(weight.device, weight.dtype)
        self._bare_critic = PlainCritic(trainer.state.critic).to(weight.device, weight.dtype)
        self.critic: nn.Module = self._bare_critic
        if world_size > 1:
            self.generator, self.critic = map(DistributedDataParallel, (self.generator, self.critic))
        self._generator_optimizer = _optimizer(training.generator_optimizer, self.generator)
        self._critic_optimizer = _optimizer(training.critic_optimizer, self.critic)
        self._step = trainer.state.step

    def train_step(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Returns this rank's critic loss (mean of both halves over the iterations) and generator loss."""
        trainer, training = self._trainer, self._trainer.config.training
        objective, latent_dim = trainer.objective, trainer.config.network.latent_dim
        losses = []
        for index in range(training.n_critic):
            batch = next(batches)
            real = batch.images.to(trainer.interval.dtype) / 255
            latents = trainer.draw(rng.critic_latents, self._step, index, training.batch_size, latent_dim)
            labels = trainer.draw_labels(rng.critic_labels, self._step, index)
            with torch.no_grad():
                self.generator.train(training.critic_fakes == "batch")
                fake = self.generator(latents, labels)
            self._critic_optimizer.zero_grad()
            real_scores, real_logits = self.critic(real)
            real_loss = objective.real_loss(real_scores)
            fake_scores, fake_logits = self.critic(fake)
            fake_loss = objective.fake_loss(fake_scores)
            if objective.classifies:
                real_loss = real_loss + F.cross_entropy(real_logits, batch.labels)
                fake_loss = fake_loss + F.cross_entropy(fake_logits, labels)
            loss = objective.joint_weight * (real_loss + fake_loss)
            if training.gradient_penalty is not None:
                mix = trainer.draw(rng.penalty_mix, self._step, index, training.batch_size).view(-1, 1, 1, 1)
                between = (mix * real + (1 - mix) * fake).requires_grad_()
                loss = loss + training.gradient_penalty * gradient_penalty(self.critic(between)[0], between)
            torch.autograd.backward(loss)
            self._critic_optimizer.step()
            if training.clip_value is not None:
                for parameter in self.critic.parameters():
                    parameter.data.clamp_(-training.clip_value, training.clip_value)
            losses.append((real_loss.item() + fake_loss.item()) / 2)
        latents = trainer.draw(rng.generator_latents, self._step, training.batch_size, latent_dim)
        labels = trainer.draw_labels(rng.generator_labels, self._step)
        self.generator.train()
        self._generator_optimizer.zero_grad()
        scores, logits = self._bare_critic(self.generator(latents, labels))
        loss = objective.generator_loss(scores)
        if objective.classifies:
            loss = loss + F.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        self._generator_optimizer.step()
        self._step += 1
        return sum(losses) / len(losses), loss.item()


def _optimizer(config: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    if config.algorithm == "adam":
        return torch.optim.Adam(network.parameters(), config.learning_rate, config.betas, config.epsilon)
    return torch.optim.RMSprop(network.parameters(), config.learning_rate, config.rho, config.epsilon)


class RegisteredMnistFeatures(FeatureExtractorBase):  # type: ignore[misc]
    """The shipped classifier as torch-fidelity takes it: `feature_extractor="mnist"`."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.extractor = MnistFeatures(torch.device("cpu"), MNIST_SHAPE)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(("features", "logits"), self.extractor(images), strict=True))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


torch_fidelity.register_feature_extractor("mnist", RegisteredMnistFeatures)


class _Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def fidelity_scores(fake: Tensor, real: Tensor, **arguments: Any) -> dict[str, float]:
    """FID, KID and Inception Score of uint8 images (n, C, H, W) by `torch_fidelity.calculate_metrics`, on the CPU and
    under its names; `arguments` are more of its own."""
    scores: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=_Images(fake),
        input2=_Images(real),
        cuda=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        fid=True,
        kid=True,
        isc=True,
        **arguments,
    )
    return scores
