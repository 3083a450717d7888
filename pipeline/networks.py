"""Generator and critic of the reference notebook: forward passes only.

Both reproduce Keras's geometry. 'same' padding with stride 2 is asymmetric where the sizes do not divide evenly, the
transposed convolution crops one row before and two after, and images flatten in H, W, C order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import NetworkConfig
from pipeline.convolutions import MirroredConv2d, MirroredConvTranspose2d, SameConv2d
from pipeline.errors import UserError

GENERATOR_CHANNELS = (128, 128, 64, 32)
CRITIC_CHANNELS = (32, 64, 128, 256)
CRITIC_STRIDES = (2, 2, 2, 1)
LEAK = 0.2
NORM_EPSILON = 1e-3


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channel counts of a network whose `network.width` is `width`, at least 1 each."""
    return [max(1, round(count * width)) for count in channels]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of any number of batches (n, c, h, w): each is normalised with its own statistics in training, and
    the moving averages take them in one after the other."""

    def forward(self, batches: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return [super(BatchNorm, self).forward(images) for images in batches]


class Statistics(NamedTuple):
    """Mean and biased variance of a batch norm's input, (channels,) each, over `num_values` values of a channel."""

    mean: Tensor
    variance: Tensor
    num_values: Tensor | int


def normalise(norm: nn.BatchNorm2d, images: Tensor, statistics: Statistics) -> Tensor:
    """Batch norm with the statistics given."""
    scale = norm.weight * torch.rsqrt(statistics.variance + norm.eps)
    centred = images - statistics.mean[:, None, None]
    normalised: Tensor = centred * scale[:, None, None] + norm.bias[:, None, None]
    return normalised


@torch.no_grad()
def update_moving_averages(norm: nn.BatchNorm2d, statistics: Statistics) -> None:
    """What a batch norm in training mode does with its batch's statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(statistics.mean, norm.momentum)
    unbiased = statistics.variance * (statistics.num_values / (statistics.num_values - 1))
    norm.running_var.lerp_(unbiased, norm.momentum)


class Generator(nn.Module):
    """Latents (n, latent_dim), entries in [-1, 1] -> images (n, C, H, W), pixels in [0, 1].

    With classes, labels (n,) int64 in [0, num_classes) are concatenated one-hot to the latents.
    At 28 x 28 x 1, width 1 and no classes it has 1,301,505 parameters, counting the moving averages.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        image_channels, height, width = image_shape
        if height % 4 or width % 4:
            raise UserError(
                f"images of {height} x {width}: the generator doubles twice, so both sides must be multiples of 4 "
                "(prepare the dataset with another --size)"
            )
        self.config, self.image_shape, self.num_classes = config, image_shape, num_classes
        first, *hidden = scaled(GENERATOR_CHANNELS, config.width)
        channels = [first, *hidden, image_channels]
        self.base = (height // 4, width // 4, first)
        self.dense = nn.Linear(config.latent_dim + num_classes, math.prod(self.base))
        self.norms = nn.ModuleList(BatchNorm(count, eps=NORM_EPSILON, momentum=0.01) for count in channels[:-1])
        # With stride 1 a transposed convolution is a convolution with the kernel flipped, which is the faster kernel.
        self.convolutions = nn.ModuleList(
            MirroredConvTranspose2d(channels[i], channels[i + 1])
            if i < 2
            else MirroredConv2d(channels[i], channels[i + 1], 1)
            for i in range(4)
        )

    def spec(self) -> dict[str, Any]:
        """What `from_spec` rebuilds the network from, as JSON-serialisable values."""
        return {
            "network": dataclasses.asdict(self.config),
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Generator:
        return cls(NetworkConfig(**spec["network"]), tuple(spec["image_shape"]), spec["num_classes"])

    def forward(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        statistics: Sequence[Statistics] | None = None,
        depth: int | None = None,
        num_batches: int = 1,
    ) -> Tensor:
        """`statistics` are used by the batch norms in the place of their own; `depth` stops before that batch norm and
        returns what it would normalise. The latents may be those of `num_batches` batches, one after the other."""
        if self.num_classes:
            if labels is None:
                raise ValueError("a generator with classes takes labels")
            latents = torch.cat([latents, F.one_hot(labels, self.num_classes).to(latents.dtype)], dim=1)
        # Keras reshapes to H, W, C: permuted, that is already a channels-last tensor.
        first: Tensor = self.dense(latents).unflatten(1, self.base).permute(0, 3, 1, 2).flip(2, 3)
        batches = list(first.chunk(num_batches)) if num_batches > 1 else [first]
        for index, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
            if index == depth:
                break
            assert isinstance(norm, BatchNorm)
            if statistics is None:
                batches = norm(batches)
            else:
                batches = [normalise(norm, images, statistics[index]) for images in batches]
            batches = [convolution(F.relu(images)) for images in batches]
        images = torch.cat(batches) if num_batches > 1 else batches[0]
        return images if depth is not None else torch.sigmoid(images).flip(2, 3)


class Critic(nn.Module):
    """Images (n, C, H, W), pixels in [0, 1] -> scores (n,), unbounded, and class logits (n, num_classes) or None.

    The WGAN paper's critic, called discriminator in the papers of the other objectives.
    At 28 x 28 x 1, width 1 and no classes it has 1,080,577 parameters.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        channels = [image_shape[0], *scaled(CRITIC_CHANNELS, config.width)]
        self.convolutions = nn.ModuleList(
            MirroredConv2d(channels[i], channels[i + 1], stride) for i, stride in enumerate(CRITIC_STRIDES[:-1])
        )
        # At stride 1 the padding is even, and this kernel too large to be mirrored each time.
        self.convolutions.append(SameConv2d(channels[-2], channels[-1]))
        height, width = (math.ceil(side / math.prod(CRITIC_STRIDES)) for side in image_shape[1:])
        features = height * width * channels[-1]
        self.score = nn.Linear(features, 1)
        self.classes: nn.Module | None = None
        if num_classes:
            self.classes = nn.Sequential(nn.Linear(features, 128), nn.Linear(128, num_classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        *mirrored, last = self.convolutions
        images = images.flip(2, 3)
        for convolution in mirrored:
            images = convolution(F.leaky_relu(images, LEAK))
        images = last(F.leaky_relu(images.flip(2, 3), LEAK))
        features = images.permute(0, 2, 3, 1).flatten(1)
        logits = None if self.classes is None else self.classes(features)
        return self.score(features).squeeze(1), logits


def initialise(network: nn.Module, random: torch.Generator) -> None:
    """Keras's defaults: Glorot-uniform weights (Glorot & Bengio 2010, eq. 16), zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight, generator=random)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
