"""Faster forms of the networks' layers on a CPU. They compute what the stock layers compute, to rounding.

`use_cpu_kernels(network)` adds them to networks that know nothing of them. `pipeline/benchmark.py` measures what each
gains ("kernels"); a form that gains less than 5 % of its layer's time has no place here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.compat import has_matrix_tiles
from pipeline.models.networks import KERNEL

HALF = KERNEL // 2
CPU_LANES = 16
"""float32 numbers of a vector register."""
LARGE_KERNEL, LARGEST_SMALL_SIDE = 2**18, 6
"""The size of a kernel, in numbers, that a cache does not hold beside its images; and the side of maps, in pixels, up
to which much of what it multiplies is padding."""
PAIR_TAPS = 1 + 2 * torch.arange(3).view(3, 1, 1) + torch.arange(2).view(2, 1) - torch.arange(2)
"""(3, 2, 2): element [m, p, q] says which tap of a kernel's row (with a zero at either end) connects pixel p of the
input pair m - 1 pairs away with pixel q of an output pair."""


def use_cpu_kernels(network: nn.Module) -> None:
    """Replaces the forward pass of each layer that has a faster form; parameters and state dict stay as they are."""
    for layer in network.modules():
        if (form := faster_form(layer)) is not None:
            layer.forward = partial(form, layer)


def faster_form(layer: nn.Module) -> Callable[..., Tensor] | None:
    """Returns the function (layer, images) -> outputs that replaces the layer's own forward pass, or None."""
    if isinstance(layer, nn.ConvTranspose2d) and layer.stride == (2, 2) and layer.output_padding == (1, 1):
        return transposed_convolution
    if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1) and layer.kernel_size == (KERNEL, KERNEL):
        if layer.in_channels >= KERNEL**2 * layer.out_channels:
            return convolution_by_taps
        if layer.out_channels < CPU_LANES:
            return convolution_on_pairs
        # A reference step gains 11 to 15 % by it on Xeons with AMX, and lost 5 % on an EPYC without.
        if layer.weight.numel() >= LARGE_KERNEL and has_matrix_tiles():
            return convolution_by_products
    return None


def _on_plain_cpu(images: Tensor) -> bool:
    """Returns whether to use a form of ours: not under autocast, where operands differ in type and torch's functions
    choose one."""
    return images.is_cpu and not torch.is_autocast_enabled("cpu")


def convolution_by_taps(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Computes a convolution as one matrix product, of what each pixel adds to each of the 25 around it, and adds that
    up there (`fold`). From many channels to few it takes half the time of torch's."""
    towards = layer.weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, layer.in_channels, 1, 1)
    assert layer.bias is not None
    return (
        F.fold(F.conv2d(images, towards).flatten(2), images.shape[2:], KERNEL, padding=HALF) + layer.bias[:, None, None]
    )


def convolution_on_pairs(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Computes a convolution on pairs of pixels of a row, each taken as one pixel of twice the channels: images become
    (n, 2 in, h, w / 2), which are the same bytes in channels-last memory.

    For few output channels a CPU's kernels leave lanes of their vectors empty. On pairs they do a fifth more work in up
    to 30 % less time.
    """
    num_images, channels, height, width = images.shape
    if width % 2:
        return F.conv2d(images, layer.weight, layer.bias, padding=HALF)
    pairs = images.permute(0, 2, 3, 1).reshape(num_images, height, width // 2, 2 * channels).permute(0, 3, 1, 2)
    taps = F.pad(layer.weight, (1, 1))[..., PAIR_TAPS]
    weight = taps.permute(5, 0, 4, 1, 2, 3).reshape(2 * layer.out_channels, 2 * channels, KERNEL, 3)
    assert layer.bias is not None
    outputs = F.conv2d(pairs, weight, layer.bias.repeat(2), padding=(HALF, 1))
    outputs = outputs.permute(0, 2, 3, 1).reshape(num_images, height, width, layer.out_channels)
    return outputs.permute(0, 3, 1, 2)


def convolution_by_products(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Computes a convolution as matrix products of parts of the operands, which leave out the padding. On maps of 4 x 4
    it takes half to two thirds of the time of torch's."""
    if not _on_plain_cpu(images) or max(images.shape[2:]) > LARGEST_SMALL_SIDE:
        return F.conv2d(images, layer.weight, layer.bias, padding=HALF)
    outputs: Tensor = _ConvolutionByProducts.apply(images, layer.weight, layer.bias)
    return outputs


class _ConvolutionByProducts(torch.autograd.Function):
    """The products on maps as rows (h * n, w * channels), row 0 of all n first, and a kernel (out, KERNEL,
    KERNEL * in)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(images, weight)
        n, _, h, w = images.shape
        inputs, kernel, outputs = _rows(images), weight.permute(0, 2, 3, 1).flatten(2), bias.repeat(h * n, w)
        for into, taps, out in _products(images.shape, len(weight)):
            outputs[out].addmm_(inputs[into], kernel[taps].T)
        return outputs.view(h, n, w, -1).permute(1, 3, 0, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a gradient penalty, which differentiates once more: torch's own does that
            rest = [len(weight)], [1, 1], [HALF, HALF], [1, 1], False, [0, 0], 1, ctx.needs_input_grad
            gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(upstream, images, weight, *rest)
            return gradients
        n, _, h, w = images.shape
        _, trained, _ = ctx.needs_input_grad
        inputs, kernel, above = _rows(images), weight.permute(0, 2, 3, 1).flatten(2), _rows(upstream)
        for_inputs, for_kernel = torch.zeros_like(inputs), torch.zeros_like(kernel) if trained else None
        for into, taps, out in _products(images.shape, len(weight)):
            for_inputs[into].addmm_(above[out], kernel[taps])
            if for_kernel is not None:
                for_kernel[taps].addmm_(above[out].T, inputs[into])
        for_images = for_inputs.view(h, n, w, -1).permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
        if for_kernel is None:
            return for_images, None, None
        return for_images, for_kernel.view(len(weight), KERNEL, KERNEL, -1).permute(0, 3, 1, 2), upstream.sum((0, 2, 3))


def _rows(images: Tensor) -> Tensor:
    """Returns images (n, c, h, w) as rows (h * n, w * c)."""
    n, c, h, w = images.shape
    return images.permute(2, 0, 3, 1).reshape(h * n, w * c)


def _products(shape: Sequence[int], out_channels: int) -> Iterator[tuple[Any, Any, Any]]:
    """Yields, for every column of outputs and every row of the kernel, which part of the inputs' rows is multiplied
    with which part of the kernel, and to which part of the outputs' rows the product is added."""
    n, in_channels, height, width = shape
    for column in range(width):
        first, last = max(0, HALF - column), min(KERNEL, HALF - column + width)
        into_columns = slice((column - HALF + first) * in_channels, (column - HALF + last) * in_channels)
        out_columns = slice(column * out_channels, (column + 1) * out_channels)
        for row in range(KERNEL):
            top, bottom = max(0, HALF - row), min(height, HALF - row + height)
            into = slice((top + row - HALF) * n, (bottom + row - HALF) * n), into_columns
            taps = slice(None), row, slice(first * in_channels, last * in_channels)
            yield into, taps, (slice(top * n, bottom * n), out_columns)


def transposed_convolution(layer: nn.ConvTranspose2d, images: Tensor) -> Tensor:
    """Computes a transposed convolution, and the gradient of its kernel as that of the convolution in the other
    direction, which takes two thirds of the time of torch's own."""
    if torch.is_grad_enabled() and _on_plain_cpu(images):
        outputs: Tensor = _TransposedConvolution.apply(images, layer.weight, layer.bias)
        return outputs
    return F.conv_transpose2d(images, layer.weight, layer.bias, stride=2, padding=HALF, output_padding=1)


class _TransposedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(images, kernel)
        return F.conv_transpose2d(images, kernel, bias, stride=2, padding=HALF, output_padding=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, kernel = ctx.saved_tensors
        other = images, upstream, kernel, None, [2, 2], [HALF, HALF], [1, 1], False, [0, 0], 1
        _, for_kernel, _ = torch.ops.aten.convolution_backward(*other, [False, True, False])
        return F.conv2d(upstream, kernel, stride=2, padding=HALF), for_kernel, upstream.sum((0, 2, 3))
