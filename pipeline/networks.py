"""Generator and critic of the reference notebook: forward passes only.

Both reproduce Keras's geometry. 'same' padding with stride 2 is asymmetric where the sizes do not divide evenly, the
transposed convolution crops one row before and two after, and images flatten in H, W, C order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import NetworkConfig, UserError

KERNEL = 5
CPU_LANES = 16
"""float32 numbers of a vector register."""
LARGE_KERNEL = 2**18
"""Numbers of a kernel that a CPU's cache does not hold beside its images."""
PAIR_TAPS = 1 + 2 * torch.arange(3).view(3, 1, 1) + torch.arange(2).view(2, 1) - torch.arange(2)
"""(3, 2, 2): which tap of a kernel's row (with a zero at either end) connects pixel p of the input pair m - 1 pairs
away with pixel q of an output pair."""
GENERATOR_CHANNELS = (128, 128, 64, 32)
CRITIC_CHANNELS = (32, 64, 128, 256)
CRITIC_STRIDES = (2, 2, 2, 1)
LEAK = 0.2
NORM_EPSILON = 1e-3


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channel counts of a network whose `network.width` is `width`, at least 1 each."""
    return [max(1, round(count * width)) for count in channels]


def _on_plain_cpu(images: Tensor) -> bool:
    """Without autocast, under which operands have different types and torch's own functions choose."""
    return images.is_cpu and not torch.is_autocast_enabled("cpu")


class MirroredConv2d(nn.Conv2d):
    """Conv2D of Keras with padding 'same', for images that are mirrored in both axes.
    (n, in, h, w) -> (n, out, ceil(h / stride), ceil(w / stride)).

    With stride 2 and even sizes Keras pads one row before and two after, torch two on either side and leaves the last
    one: in the mirror that is the same. Padding by hand would cost a copy of the images each time.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL, stride, padding=KERNEL // 2)

    def forward(self, images: Tensor) -> Tensor:
        kernel = self.weight.flip(2, 3)
        if images.is_cpu and self.stride[0] == 1:
            if self.in_channels >= KERNEL**2 * self.out_channels:
                return self._by_taps(images)
            if self.out_channels < CPU_LANES and images.shape[-1] % 2 == 0:
                return self._on_pairs(images, kernel)
        return F.conv2d(images, kernel, self.bias, self.stride, self.padding)

    def _by_taps(self, images: Tensor) -> Tensor:
        """The same as a matrix product: what each pixel adds to each of the 25 around it, summed up where it belongs.
        For few channels out of many that takes half of a convolution's time on a CPU."""
        taps = F.conv2d(images, self.weight.permute(0, 2, 3, 1).reshape(-1, self.in_channels, 1, 1))
        assert self.bias is not None
        return F.fold(taps.flatten(2), images.shape[2:], KERNEL, padding=KERNEL // 2) + self.bias[:, None, None]

    def _on_pairs(self, images: Tensor, kernel: Tensor) -> Tensor:
        """The same with pairs of pixels in a row taken as one pixel of twice the channels: (n, 2 in, h, w / 2), in
        channels-last memory the same bytes. A CPU's kernels leave lanes empty for few channels; on the pairs they do a
        fifth more work in up to 30 % less time."""
        num_images, channels, height, width = images.shape
        pairs = images.permute(0, 2, 3, 1).reshape(num_images, height, width // 2, 2 * channels).permute(0, 3, 1, 2)
        taps = F.pad(kernel, (1, 1))[..., PAIR_TAPS]
        weight = taps.permute(5, 0, 4, 1, 2, 3).reshape(2 * self.out_channels, 2 * channels, KERNEL, 3)
        assert self.bias is not None
        outputs = F.conv2d(pairs, weight, self.bias.repeat(2), padding=(KERNEL // 2, 1))
        outputs = outputs.permute(0, 2, 3, 1).reshape(num_images, height, width, self.out_channels)
        return outputs.permute(0, 3, 1, 2)


class SameConv2d(nn.Conv2d):
    """Conv2D of Keras with stride 1 and padding 'same': (n, in, h, w) -> (n, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL, padding=KERNEL // 2)

    def forward(self, images: Tensor) -> Tensor:
        if _on_plain_cpu(images) and self.weight.numel() >= LARGE_KERNEL:
            outputs: Tensor = _ConvolutionByRows.apply(images, self.weight, self.bias)
            return outputs
        return super().forward(images)


class _ConvolutionByRows(torch.autograd.Function):
    """What SameConv2d computes, as matrix products of parts of its operands.

    For images of 4 x 4 and a kernel larger than the cache that takes half of the time of a CPU's own convolution, which
    multiplies the padding too.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        n, _, h, w = images.shape
        inputs, kernel = _rows(images), _kernel_rows(weight)
        outputs = bias.repeat(h * n, w)
        for into, taps, out in _products(images.shape, len(weight)):
            outputs[out].addmm_(inputs[into], kernel[taps].T)
        return outputs.view(h, n, w, -1).permute(1, 3, 0, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller wants to differentiate once more, as a gradient penalty does
            rest = [len(weight)], [1, 1], [KERNEL // 2] * 2, [1, 1], False, [0, 0], 1, ctx.needs_input_grad
            gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(upstream, images, weight, *rest)
            return gradients
        n, _, h, w = images.shape
        inputs, kernel, above = _rows(images), _kernel_rows(weight), _rows(upstream)
        for_inputs, for_kernel = torch.zeros_like(inputs), torch.zeros_like(kernel)
        _, wants_kernel, wants_bias = ctx.needs_input_grad
        for into, taps, out in _products(images.shape, len(weight)):
            for_inputs[into].addmm_(above[out], kernel[taps])
            if wants_kernel:
                for_kernel[taps].addmm_(above[out].T, inputs[into])
        for_images = for_inputs.view(h, n, w, -1).permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
        for_weight = for_kernel.view(len(weight), KERNEL, KERNEL, -1).permute(0, 3, 1, 2) if wants_kernel else None
        return for_images, for_weight, upstream.sum((0, 2, 3)) if wants_bias else None


def _rows(images: Tensor) -> Tensor:
    """(n, c, h, w) -> (h * n, w * c): row 0 of all images, then row 1 of all, ..."""
    n, c, h, w = images.shape
    return images.permute(2, 0, 3, 1).reshape(h * n, w * c)


def _kernel_rows(weight: Tensor) -> Tensor:
    """(out, in, KERNEL, KERNEL) -> (out, KERNEL, KERNEL * in), a view of channels-last memory."""
    return weight.permute(0, 2, 3, 1).flatten(2)


def _products(
    shape: Sequence[int], out_channels: int
) -> Iterator[tuple[tuple[slice, slice], Any, tuple[slice, slice]]]:
    """For every column of outputs and every row of the kernel: which `_rows` of the inputs times which part of
    `_kernel_rows` add to which `_rows` of the outputs."""
    n, in_channels, height, width = shape
    half = KERNEL // 2
    for column in range(width):
        first, last = max(0, half - column), min(KERNEL, half - column + width)
        into_columns = slice((column - half + first) * in_channels, (column - half + last) * in_channels)
        out_columns = slice(column * out_channels, (column + 1) * out_channels)
        for row in range(KERNEL):
            top, bottom = max(0, half - row), min(height, half - row + height)
            into = slice((top + row - half) * n, (bottom + row - half) * n), into_columns
            taps = slice(None), row, slice(first * in_channels, last * in_channels)
            yield into, taps, (slice(top * n, bottom * n), out_columns)


class MirroredConvTranspose2d(nn.ConvTranspose2d):
    """Conv2DTranspose of Keras with stride 2 and padding 'same', for images that are mirrored in both axes.
    (n, in, h, w) -> (n, out, 2 h, 2 w).

    Keras crops the full result by one row before and two after, torch's `output_padding` by two before and one after.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL, stride=2, padding=2, output_padding=1)

    def forward(self, images: Tensor, output_size: list[int] | None = None) -> Tensor:
        kernel = self.weight.flip(2, 3)
        if torch.is_grad_enabled() and _on_plain_cpu(images):
            outputs: Tensor = _TransposedConvolution.apply(images, kernel, self.bias)
            return outputs
        return F.conv_transpose2d(images, kernel, self.bias, stride=2, padding=2, output_padding=1)


class _TransposedConvolution(torch.autograd.Function):
    """What MirroredConvTranspose2d computes, with the gradient of its kernel taken as that of the convolution in the
    other direction: two thirds of the time that torch's own takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(images, kernel)
        return F.conv_transpose2d(images, kernel, bias, stride=2, padding=2, output_padding=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, kernel = ctx.saved_tensors
        other = images, upstream, kernel, None, [2, 2], [2, 2], [1, 1], False, [0, 0], 1
        _, for_kernel, _ = torch.ops.aten.convolution_backward(*other, [False, True, False])
        return F.conv2d(upstream, kernel, stride=2, padding=2), for_kernel, upstream.sum((0, 2, 3))


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
