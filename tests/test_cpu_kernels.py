"""The convolutions against Keras's geometry, written out in NumPy from its definition, and against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models import cpu_kernels as convolutions
from pipeline.models.cpu_kernels import MirroredConv2d, MirroredConvTranspose2d, SameConv2d
from tests.keras_reference import Array, keras_conv, keras_conv_transpose


def random_images(seed: int, size: int, channels: int) -> tuple[torch.Tensor, Array]:
    images = torch.randn(1, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return images, images[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("size", "stride"), [(28, 2), (14, 2), (7, 2), (4, 1), (9, 2)])
def test_convolution_is_keras_same(size: int, stride: int) -> None:
    layer = MirroredConv2d(2, 3, stride).double()
    images, array = random_images(size, size, 2)
    kernel = layer.weight.detach().permute(2, 3, 1, 0).numpy()
    expected = keras_conv(array, kernel, layer.state_dict()["bias"].numpy(), stride)
    np.testing.assert_allclose(
        layer(images.flip(2, 3)).flip(2, 3)[0].detach().permute(1, 2, 0).numpy(), expected, atol=1e-12
    )


@pytest.mark.parametrize("size", [7, 14])
def test_transposed_convolution_is_keras_same(size: int) -> None:
    layer = MirroredConvTranspose2d(3, 2).double()
    images, array = random_images(size, size, 3)
    kernel = layer.weight.detach().permute(2, 3, 1, 0).numpy()
    expected = keras_conv_transpose(array, kernel, layer.state_dict()["bias"].numpy(), 2)
    np.testing.assert_allclose(
        layer(images.flip(2, 3)).flip(2, 3)[0].detach().permute(1, 2, 0).numpy(), expected, atol=1e-12
    )


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(3, 2, 6), (3, 2, 7), (30, 1, 6), (60, 2, 7), (3, 17, 6)])
def test_stride_one_transposed_convolution_is_a_convolution_with_the_kernel_flipped(
    inputs: int, outputs: int, size: int
) -> None:
    """On pairs of pixels, by taps, and plainly."""
    layer = MirroredConv2d(inputs, outputs, 1).double()
    images, array = random_images(0, size, inputs)
    kernel = layer.weight.detach().flip(2, 3).permute(2, 3, 0, 1).numpy()
    expected = keras_conv_transpose(array, kernel, layer.state_dict()["bias"].numpy(), 1)
    result = layer(images.flip(2, 3)).flip(2, 3)
    np.testing.assert_allclose(result[0].detach().permute(1, 2, 0).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (3, 8), (2, 1), (1, 3)])
def test_a_large_kernels_matrix_products_are_the_convolution(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients, and the gradients of a gradient penalty; with a trained kernel and with a frozen one."""
    random = torch.Generator().manual_seed(sum(shape))
    layer = SameConv2d(3, 2).double().to(memory_format=torch.channels_last)
    images = torch.randn(6, 3, *shape, dtype=torch.float64, generator=random, requires_grad=True)
    weights = torch.randn(6, 2, *shape, dtype=torch.float64, generator=random)

    def found(trained: bool) -> list[Tensor]:
        layer.weight.requires_grad_(trained)
        outputs = layer(images)
        (first,) = torch.autograd.grad((outputs.sin() * weights).sum(), images, create_graph=True)
        inputs = [images, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        once = torch.autograd.grad((layer(images).sin() * weights).sum(), inputs)
        twice = torch.autograd.grad(first.square().sum(), inputs)
        return [outputs, first, *once, *twice]

    for trained in (True, False):
        expected = found(trained)
        with monkeypatch.context() as patch:
            patch.setattr(convolutions, "LARGE_KERNEL", 0)
            patch.setattr(F, "conv2d", None)  # it must not be compared with itself
            torch.testing.assert_close(found(trained), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [5, 8])
def test_gradients_of_the_transposed_convolution_are_torchs(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    layer = MirroredConvTranspose2d(3, 2).double()
    images = torch.randn(4, 3, size, size + 1, dtype=torch.float64, generator=random, requires_grad=True)
    inputs = [images, *layer.parameters()]
    kernel = layer.weight.flip(2, 3)
    plain = F.conv_transpose2d(images, kernel, layer.bias, stride=2, padding=2, output_padding=1)
    outputs = layer(images)
    weights = torch.randn(outputs.shape, dtype=torch.float64, generator=random)
    for ours, theirs in zip(
        torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(plain, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
