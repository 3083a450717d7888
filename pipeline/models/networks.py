"""Generator and critic of the reference notebook, from stock layers: forward passes only.

Keras's 'same' padding is asymmetric where a stride of 2 does not divide the size, and its transposed convolution crops
one row before and two after. On images mirrored in both axes that is torch's own symmetric padding. So the networks
live mirrored: real images are mirrored once when they are loaded, generated ones once when they are rendered, and
weights are stored mirrored (`mirror`). Keras flattens to height, width, channels; so do these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import NetworkConfig
from pipeline.models.depth import check_sides, critic_layers, doublings_of, generator_layers, halvings_of
from pipeline.models.interface import AnyGenerator

KERNEL = 5
LEAK = 0.2
NORM_EPSILON = 1e-3
BATCHES_TOGETHER = 16
"""Most critic batches whose images are made at once: memory for those of a burn-in would be twenty times an ordinary
step's."""


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channel counts of a network whose `network.width` is `width`, at least 1 each."""
    return [max(1, round(count * width)) for count in channels]


class Generator(AnyGenerator):
    """Latents (n, latent_dim), entries in [-1, 1] -> mirrored images (n, C, H, W), pixels in [0, 1].

    With classes, labels (n,) int64 in [0, num_classes) are concatenated one-hot to the latents.
    At 28 x 28 x 1, width 1 and no classes it has 1,301,505 parameters, counting the moving averages.

    Args:
        doublings: from the first feature maps to the images; None: as many as the size takes (depth.py).

    Raises:
        UserError: no doublings reach images of this size.
        ValueError: those that are given don't.
    """

    def __init__(
        self,
        config: NetworkConfig,
        image_shape: tuple[int, int, int],
        num_classes: int = 0,
        doublings: int | None = None,
    ) -> None:
        super().__init__(config, image_shape, num_classes)
        image_channels, height, width = image_shape
        if doublings is None:
            check_sides(height, width)
            doublings = doublings_of(height, width)
        channels, self.strides = generator_layers(doublings)
        if height % 2**doublings or width % 2**doublings:
            raise ValueError(f"{doublings} doublings don't reach images of {height} x {width}")
        self.doublings = doublings
        channels = [*scaled(channels, config.width), image_channels]
        self.base = (height >> doublings, width >> doublings)
        """Rows and columns of the first feature maps."""
        self.dense = nn.Linear(config.latent_dim + num_classes, math.prod(self.base) * channels[0])
        self.norms = nn.ModuleList(nn.BatchNorm2d(count, eps=NORM_EPSILON, momentum=0.01) for count in channels[:-1])
        # With stride 1 a transposed convolution is a convolution with the kernel flipped, which is the faster kernel.
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(before, after, KERNEL, stride, padding=2, output_padding=1)
            if stride == 2
            else nn.Conv2d(before, after, KERNEL, padding=2)
            for before, after, stride in zip(channels, channels[1:], self.strides, strict=False)
        )

    def spec(self) -> dict[str, Any]:
        # Files of before there were others say nothing of two doublings.
        return super().spec() | ({} if self.doublings == 2 else {"doublings": self.doublings})

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self.first_maps(latents, labels)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            images = convolution(F.relu(norm(images)))
        return torch.sigmoid(images)

    def first_maps(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """(n, channels, *base), before the first batch norm; channels-last in memory, as Keras reshapes."""
        if self.num_classes:
            if labels is None:
                raise ValueError("a generator with classes takes labels")
            latents = torch.cat([latents, F.one_hot(labels, self.num_classes).to(latents.dtype)], dim=1)
        maps: Tensor = self.dense(latents).unflatten(1, (*self.base, -1)).permute(0, 3, 1, 2)
        return maps


class StepGenerator(nn.Module):
    """A generator that makes all images of a training step: it does not change before its own update.

    Args:
        fakes_by_batch: in the critic's images batch norm takes the statistics of each batch, not the moving averages.
    """

    def __init__(self, generator: AnyGenerator, fakes_by_batch: bool) -> None:
        super().__init__()
        self.generator, self.fakes_by_batch = generator, fakes_by_batch

    def forward(
        self, critic_latents: Tensor, critic_labels: Tensor, latents: Tensor, labels: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Images (k, b, C, H, W) of the critic's k batches of latents (k, b, latent_dim), which want no gradients, and
        a list of one micro-batch (b, C, H, W) of the generator's own latents (b, latent_dim)."""
        generator = self.generator.train(self.fakes_by_batch)
        with torch.no_grad():
            if critic_latents.is_cuda and not generator.training:  # a GPU takes all at once, a CPU's caches prefer few
                given = (torch.split(batches, BATCHES_TOGETHER) for batches in (critic_latents, critic_labels))
                fakes = torch.cat([generator(z.flatten(0, 1), y.flatten()) for z, y in zip(*given, strict=True)])
                fakes = fakes.view(*critic_labels.shape, *fakes.shape[1:])
            else:
                fakes = torch.stack([generator(*batch) for batch in zip(critic_latents, critic_labels, strict=True)])
        return fakes, [generator.train()(latents, labels)]


class Critic(nn.Module):
    """Mirrored images (n, C, H, W), pixels in [0, 1] -> scores (n,), unbounded, and class logits (n, num_classes) or
    None.

    The WGAN paper's critic, called discriminator in the papers of the other objectives.
    At 28 x 28 x 1, width 1 and no classes it has 1,080,577 parameters.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        channels, self.strides = critic_layers(halvings_of(*image_shape[1:]))
        channels = [image_shape[0], *scaled(channels, config.width)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, KERNEL, stride, padding=2)
            for before, after, stride in zip(channels, channels[1:], self.strides, strict=False)
        )
        self.base = critic_base(image_shape, math.prod(self.strides))
        """Rows and columns of the last feature maps."""
        features = math.prod(self.base) * channels[-1]
        self.score = nn.Linear(features, 1)
        self.classes: nn.Module | None = None
        if num_classes:
            self.classes = nn.Sequential(nn.Linear(features, 128), nn.Linear(128, num_classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        # The first activation is no idle one: augmented pixels may be negative, and a penalty's slope at 0 is LEAK.
        for convolution in self.convolutions:
            images = convolution(F.leaky_relu(images, LEAK))
        features = images.permute(0, 2, 3, 1).flatten(1)
        logits = None if self.classes is None else self.classes(features)
        return self.score(features).squeeze(1), logits


def critic_base(image_shape: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of the last feature maps of a critic of this stride in all, for images (C, H, W)."""
    height, width = (math.ceil(side / stride) for side in image_shape[1:])
    return height, width


@torch.no_grad()
def initialise(network: Generator | Critic, random: torch.Generator) -> None:
    """Keras's defaults: Glorot-uniform weights (Glorot & Bengio 2010, eq. 16) and zero biases, in its orientation."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight, generator=random)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        parameter.copy_(mirror(name, parameter, network.base))


def mirror(name: str, tensor: Tensor, base: tuple[int, int]) -> Tensor:
    """A network's parameter, or an optimiser's moment of it, between Keras's orientation and the mirrored one.

    It is its own inverse.

    Args:
        name: the parameter's name in its network, maybe with more behind it (`dense.weight.square_avg`).
        base: rows and columns of the feature maps that the dense layer makes or the scores are taken from.
    """
    if tensor.ndim == 4:
        return tensor.flip(2, 3)
    if name.startswith("dense.") and tensor.ndim:
        return tensor.reshape(*base, -1, *tensor.shape[1:]).flip(0, 1).reshape(tensor.shape)
    if name.startswith(("score.weight", "classes.0.weight")) and tensor.ndim:
        return tensor.reshape(len(tensor), *base, -1).flip(1, 2).reshape(tensor.shape)
    return tensor


def mirror_state(network: Generator | Critic, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network's state dict in the other orientation."""
    return {name: mirror(name, tensor, network.base) for name, tensor in tensors.items()}
