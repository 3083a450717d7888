"""The reference notebook's generator and critic, from stock layers: forward passes only.

Keras's 'same' padding is asymmetric where a stride of 2 does not divide the size, and its transposed convolution crops
one row before and two after. On images mirrored in both axes that is torch's own symmetric padding. So these networks
live in a mirrored world: real images are mirrored once when they are loaded, generated ones once when they are
rendered, and weights are stored mirrored (`mirror`). Keras flattens feature maps to height, width, channels; so do
these.

Their depth follows the size of the images. The notebook's generator doubles maps of 7 x 7 twice, and its critic halves
images of 28 x 28 three times. From 32 pixels a side on, the generator doubles as often as leaves first maps of 4 to 8
pixels a side, and the critic halves as often. Layers before the notebook's in the generator, and behind them in the
critic, have twice the channels of their neighbour, as in DCGAN (Radford et al. 2016, 1511.06434), and at most 512.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config, NetworkConfig
from pipeline.errors import UserError

KERNEL = 5
LEAK = 0.2
NORM_EPSILON = 1e-3
BATCHES_TOGETHER = 16
"""Most critic batches whose images are made at once: those of a burn-in would take twenty times an ordinary step's
memory."""
GENERATOR_CHANNELS = (512, 512, 512, 256, 128, 128, 64, 32)
"""Channels before each layer of the deepest generator. One of d doublings has the last d + 2: the notebook's 128 to
32."""
CRITIC_CHANNELS = (32, 64, 128, 256, 512, 512, 512)
"""Channels after each convolution of the deepest critic. One that halves d times has the first d + 1."""
REFERENCE_DOUBLINGS, MOST_DOUBLINGS = 2, 6
REFERENCE_HALVINGS = 3
LARGEST_BASE, LARGEST_SIDE = 8, 256
SIDES = (4, 8, 12, *(base << count for count in range(2, 6) for base in range(4, 8)), LARGEST_SIDE)
"""Sides of square images that there are generators for, ascending. Those under 16 are doubled twice, from a smaller
base."""


class AnyGenerator(nn.Module):
    """What training, checkpoints, exports and evaluation need of a generator, the reference's or a user's.

    It takes latents (n, latent_dim) with entries in [-1, 1] to mirrored images (n, C, H, W) with pixels in [0, 1]. A
    conditional one also takes labels (n,), int64 in [0, num_classes); an unconditional one ignores them.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.config, self.image_shape, self.num_classes = config, image_shape, num_classes
        self.class_names: tuple[str, ...] = ()
        """The name of each label; empty where the dataset or the file has none. It is no part of `spec`: a name changes
        nothing that is computed."""

    def spec(self) -> dict[str, Any]:
        """Returns what `generator_of_spec` rebuilds the network from, as JSON-serialisable values.

        Fingerprints of scored images include it, so a network's spec must never change.
        """
        network = {"latent_dim": self.config.latent_dim, "width": self.config.width}
        return {"network": network, "image_shape": list(self.image_shape), "num_classes": self.num_classes}


# -- depth -------------------------------------------------------------------------------------------------------------


def doublings_of(height: int, width: int) -> int:
    """Returns how often a generator of such images doubles its first maps."""
    return min(MOST_DOUBLINGS, max(REFERENCE_DOUBLINGS, (min(height, width) // 4).bit_length() - 1))


def check_sides(height: int, width: int) -> None:
    """Raises UserError for a size that doubling does not reach; the message names the nearest sizes that it does."""
    factor = 2 ** doublings_of(height, width)
    if any(side % factor or side > min(LARGEST_BASE * factor, LARGEST_SIDE) for side in (height, width)):
        smaller = [side for side in SIDES if side <= min(height, width)][-1:]
        larger = [side for side in SIDES if side >= max(height, width)][:1]
        sizes = " or ".join(f"--size {side}" for side in smaller + larger)
        raise UserError(
            f"images of {height} x {width} (height x width): the generator doubles a base of 4 to {LARGEST_BASE}, "
            f"up to {LARGEST_SIDE} pixels a side, which does not reach them (prepare the dataset with {sizes})"
        )


def generator_layers(doublings: int) -> tuple[list[int], list[int]]:
    """Returns the channels before each convolution of a generator of width 1, and the convolutions' strides.

    Raises:
        ValueError: there is no generator with so many doublings.
    """
    if doublings not in range(REFERENCE_DOUBLINGS, MOST_DOUBLINGS + 1):
        raise ValueError(f"a generator doubles {REFERENCE_DOUBLINGS} to {MOST_DOUBLINGS} times, not {doublings}")
    return list(GENERATOR_CHANNELS[-2 - doublings :]), [2] * doublings + [1, 1]


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Returns the channel counts of a network whose `network.width` is `width`, at least 1 each."""
    return [max(1, round(count * width)) for count in channels]


# -- networks ----------------------------------------------------------------------------------------------------------


class Generator(AnyGenerator):
    """The reference's generator; a conditional one takes its labels one-hot beside the latents.

    For images of 28 x 28 x 1, with width 1 and no classes, it has 1,301,505 parameters, moving averages included.

    Args:
        doublings: the number of layers that double the maps; None: as many as the image size takes.

    Raises:
        UserError: no number of doublings reaches images of this size.
        ValueError: `doublings` does not reach it.
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
        # A transposed convolution of stride 1 is a convolution with the kernel flipped, whose kernels are faster.
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(before, after, KERNEL, stride, padding=2, output_padding=1)
            if stride == 2
            else nn.Conv2d(before, after, KERNEL, padding=2)
            for before, after, stride in zip(channels, channels[1:], self.strides, strict=False)
        )

    def spec(self) -> dict[str, Any]:
        # Files that are older than deeper networks have no entry for two doublings.
        return super().spec() | ({} if self.doublings == 2 else {"doublings": self.doublings})

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self.first_maps(latents, labels)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            images = convolution(F.relu(norm(images)))
        return torch.sigmoid(images)

    def first_maps(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Returns the dense layer's feature maps (n, channels, *base), which the first batch norm takes. They are
        channels-last in memory, as Keras reshapes."""
        if self.num_classes:
            if labels is None:
                raise ValueError("a generator with classes takes labels")
            latents = torch.cat([latents, F.one_hot(labels, self.num_classes).to(latents.dtype)], dim=1)
        maps: Tensor = self.dense(latents).unflatten(1, (*self.base, -1)).permute(0, 3, 1, 2)
        return maps


class StepGenerator(nn.Module):
    """A generator that makes all images of a training step in one call, since it does not change before its own update.

    Args:
        fakes_by_batch: while it makes the critic's images, batch norm takes the statistics of each batch; otherwise
            the moving averages.
    """

    def __init__(self, generator: AnyGenerator, fakes_by_batch: bool) -> None:
        super().__init__()
        self.generator, self.fakes_by_batch = generator, fakes_by_batch

    def forward(
        self, critic_latents: Tensor, critic_labels: Tensor, latents: Tensor, labels: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns images for the critic and for the generator's own update.

        Args:
            critic_latents: (k, b, latent_dim), of k batches for the critic; critic_labels: (k, b).
            latents: (b, latent_dim), of the generator's update; labels: (b,).

        Returns:
            The critic's k batches (b, C, H, W) without a graph, and a list of one micro-batch (b, C, H, W) with it.
        """
        generator, fakes = self.generator.train(self.fakes_by_batch), list[Tensor]()
        # Without batch statistics a GPU can make several batches as one; a CPU's caches prefer one at a time.
        together = BATCHES_TOGETHER if critic_latents.is_cuda and not generator.training else 1
        with torch.no_grad():
            for first in range(0, len(critic_labels), together):
                z, y = (batches[first : first + together] for batches in (critic_latents, critic_labels))
                fakes += generator(z.flatten(0, 1), y.flatten()).unflatten(0, y.shape).unbind()
        return fakes, [generator.train()(latents, labels)]


class Critic(nn.Module):
    """The WGAN paper's critic, called discriminator in the papers of the other objectives.

    It takes mirrored images (n, C, H, W) with pixels in [0, 1] to unbounded scores (n,) and class logits
    (n, num_classes), or None without classes. For images of 28 x 28 x 1, with width 1 and no classes, it has 1,080,577
    parameters.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        halvings = max(REFERENCE_HALVINGS, doublings_of(*image_shape[1:]))
        self.strides = [2] * halvings + [1]
        channels = [image_shape[0], *scaled(CRITIC_CHANNELS[: halvings + 1], config.width)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, KERNEL, stride, padding=2)
            for before, after, stride in zip(channels, channels[1:], self.strides, strict=False)
        )
        height, width = (math.ceil(side / math.prod(self.strides)) for side in image_shape[1:])
        self.base = height, width
        """Rows and columns of the last feature maps."""
        features = math.prod(self.base) * channels[-1]
        self.score = nn.Linear(features, 1)
        self.classes: nn.Module | None = None
        if num_classes:
            self.classes = nn.Sequential(nn.Linear(features, 128), nn.Linear(128, num_classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        # The first activation matters: augmented pixels may be negative, and a penalty's slope at 0 is LEAK.
        for convolution in self.convolutions:
            images = convolution(F.leaky_relu(images, LEAK))
        features = images.permute(0, 2, 3, 1).flatten(1)
        logits = None if self.classes is None else self.classes(features)
        return self.score(features).squeeze(1), logits


@torch.no_grad()
def initialise(network: Generator | Critic, random: torch.Generator) -> None:
    """Draws a network's weights as Keras does by default: Glorot-uniform (Glorot & Bengio 2010, eq. 16), in Keras's
    orientation, with zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight, generator=random)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        parameter.copy_(mirror(name, parameter, network.base))


# -- the mirrored world ------------------------------------------------------------------------------------------------


def mirror(name: str, tensor: Tensor, base: tuple[int, int]) -> Tensor:
    """Turns a network's parameter, or an optimiser's moment of it, from Keras's orientation to the mirrored one or
    back: it is its own inverse.

    Args:
        name: the parameter's name in its network; more may follow it (`dense.weight.square_avg`).
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
    """Returns the tensors of a network's state dict in the other orientation."""
    return {name: mirror(name, tensor, network.base) for name, tensor in tensors.items()}


# -- the choice between these networks and the user's own ------------------------------------------------------------

ImageShape = tuple[int, int, int]
preserve_global_rng = torch.random.fork_rng(devices=[])
"""Decorates functions that build networks. Layers draw their weights from torch's global random numbers, whose state
belongs to the caller."""


@preserve_global_rng
def build_generator(
    config: NetworkConfig, image_shape: ImageShape, num_classes: int = 0, rng: torch.Generator | None = None
) -> AnyGenerator:
    """Builds the generator that the settings name: the user's or the reference's. Its weights are drawn from `rng` (the
    user's from the seed of `rng`); without it they are arbitrary, for weights that will be loaded or not be used.

    Raises:
        UserError: the reference's does not take images of this shape; or the user's code is missing or fails.
    """
    if config.generator is not None:
        from pipeline.models.user_networks import UserGenerator

        return UserGenerator(config, image_shape, num_classes, rng)
    generator = Generator(config, image_shape, num_classes)
    if rng is not None:
        initialise(generator, rng)
    return generator


@preserve_global_rng
def build_critic(
    config: NetworkConfig, image_shape: ImageShape, num_classes: int = 0, rng: torch.Generator | None = None
) -> nn.Module:
    """Builds the critic that the settings name, as `build_generator` does the generator."""
    if config.critic is not None:
        from pipeline.models.user_networks import UserCritic

        return UserCritic(config, image_shape, num_classes, rng)
    critic = Critic(config, image_shape, num_classes)
    if rng is not None:
        initialise(critic, rng)
    return critic


@preserve_global_rng
def generator_of_spec(spec: dict[str, Any], code: str | None, source: Path) -> AnyGenerator:
    """Builds the generator that the file `source` describes. What a file names is never imported: the caller names the
    `code` (module:NAME) of a network that is not the reference's.

    Raises:
        UserError: the network takes code and the caller names none; see `build_generator`.
        ValueError, TypeError, KeyError: the file is damaged.
    """
    network, image_shape, num_classes = dict(spec["network"]), tuple(spec["image_shape"]), spec["num_classes"]
    named = network.pop("generator", None)
    if named is None:
        return Generator(NetworkConfig(**network), image_shape, num_classes, spec.get("doublings", 2))
    if code is None:
        raise UserError(
            f"{source}: holds a network of its user's own, {named}: if you trust that code, name it with "
            f"--network.generator {named} (in Python: code={named!r})"
        )
    return build_generator(NetworkConfig(**network, generator=code), image_shape, num_classes)


def build_for_sizes(config: Config, image_shape: ImageShape, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Builds generator and critic to look at their sizes. The reference's are on torch's meta device, where they take
    no memory; the user's are on the CPU, since their code may look at numbers. Raises UserError as `build_generator`.
    """
    network, dtype = config.network, dtype_of(config)
    with torch.device("meta" if network.generator is None else "cpu"):
        generator = build_generator(network, image_shape, num_classes).to(dtype)
    with torch.device("meta" if network.critic is None else "cpu"):
        return generator, build_critic(network, image_shape, num_classes).to(dtype)


def dtype_of(config: Config) -> torch.dtype:
    """Returns the dtype of the networks' weights under `runtime.precision`."""
    return torch.float64 if config.runtime.precision == "float64" else torch.float32
