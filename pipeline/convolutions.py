"""The networks' convolutions: Keras's geometry, and on a CPU forms of them that take less time than torch's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL = 5
CPU_LANES = 16
"""float32 numbers of a vector register."""
LARGE_KERNEL = 2**18
"""Numbers of a kernel that a CPU's cache does not hold beside its images."""
PAIR_TAPS = 1 + 2 * torch.arange(3).view(3, 1, 1) + torch.arange(2).view(2, 1) - torch.arange(2)
"""(3, 2, 2): which tap of a kernel's row (with a zero at either end) connects pixel p of the input pair m - 1 pairs
away with pixel q of an output pair."""


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
        _, wants_kernel, wants_bias = ctx.needs_input_grad
        for_inputs, for_kernel = torch.zeros_like(inputs), torch.zeros_like(kernel) if wants_kernel else None
        for into, taps, out in _products(images.shape, len(weight)):
            for_inputs[into].addmm_(above[out], kernel[taps])
            if for_kernel is not None:
                for_kernel[taps].addmm_(above[out].T, inputs[into])
        for_images = for_inputs.view(h, n, w, -1).permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
        for_weight = (
            None if for_kernel is None else for_kernel.view(len(weight), KERNEL, KERNEL, -1).permute(0, 3, 1, 2)
        )
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
