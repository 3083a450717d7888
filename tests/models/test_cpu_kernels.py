"""The stock layers on mirrored images against Keras's geometry, and a CPU's forms of them against the stock layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import NetworkConfig
from pipeline.models import cpu_kernels
from pipeline.models.cpu_kernels import (
    convolution_by_products,
    convolution_by_taps,
    convolution_on_pairs,
    faster_form,
    transposed_convolution,
    use_cpu_kernels,
)
from pipeline.models.networks import Critic, Generator
from tests.keras_reference import Array, keras_conv, keras_conv_transpose


def random_images(seed: int, size: int, channels: int) -> tuple[Tensor, Array]:
    images = torch.randn(1, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return images, images[0].permute(1, 2, 0).numpy()


def through_the_mirror(layer: nn.Module, images: Tensor) -> Array:
    outputs: Array = layer(images.flip(2, 3)).flip(2, 3)[0].detach().permute(1, 2, 0).numpy()
    return outputs


@pytest.mark.parametrize(("size", "stride"), [(28, 2), (14, 2), (7, 2), (4, 1), (9, 2)])
def test_a_mirrored_convolution_is_keras_same(size: int, stride: int) -> None:
    layer = nn.Conv2d(2, 3, 5, stride, padding=2).double()
    images, array = random_images(size, size, 2)
    kernel = layer.weight.detach().flip(2, 3).permute(2, 3, 1, 0).numpy()
    expected = keras_conv(array, kernel, layer.state_dict()["bias"].numpy(), stride)
    np.testing.assert_allclose(through_the_mirror(layer, images), expected, atol=1e-12)


@pytest.mark.parametrize("size", [7, 14])
def test_a_mirrored_transposed_convolution_is_keras_same(size: int) -> None:
    layer = nn.ConvTranspose2d(3, 2, 5, 2, padding=2, output_padding=1).double()
    images, array = random_images(size, size, 3)
    kernel = layer.weight.detach().flip(2, 3).permute(2, 3, 1, 0).numpy()
    expected = keras_conv_transpose(array, kernel, layer.state_dict()["bias"].numpy(), 2)
    np.testing.assert_allclose(through_the_mirror(layer, images), expected, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(3, 2, 6), (3, 2, 7), (30, 1, 6), (60, 2, 7), (3, 17, 6)])
def test_stride_one_transposed_convolution_is_a_convolution_with_the_kernel_flipped(
    inputs: int, outputs: int, size: int
) -> None:
    """On pairs of pixels, by taps, and plainly; flipped and mirrored is as it was."""
    layer = nn.Conv2d(inputs, outputs, 5, padding=2).double()
    use_cpu_kernels(layer)
    images, array = random_images(0, size, inputs)
    kernel = layer.weight.detach().permute(2, 3, 0, 1).numpy()
    expected = keras_conv_transpose(array, kernel, layer.state_dict()["bias"].numpy(), 1)
    np.testing.assert_allclose(through_the_mirror(layer, images), expected, atol=1e-12)


def everything(layer: nn.Module, images: Tensor, trained: bool) -> list[Tensor]:
    """Outputs, gradients, and the gradients of a gradient penalty; with a trained kernel and with a frozen one."""
    layer.requires_grad_(trained)
    outputs = layer(images)
    weights = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (first,) = torch.autograd.grad((outputs.sin() * weights).sum(), images, create_graph=True)
    inputs = [images, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    once = torch.autograd.grad((layer(images).sin() * weights).sum(), inputs)
    twice = torch.autograd.grad(first.square().sum(), inputs, allow_unused=True)
    return [outputs, first, *once, *(gradient for gradient in twice if gradient is not None)]


FORMS: list[tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = [
    (convolution_by_taps, lambda: nn.Conv2d(30, 1, 5, padding=2)),
    (convolution_on_pairs, lambda: nn.Conv2d(3, 2, 5, padding=2)),
    (convolution_by_products, lambda: nn.Conv2d(3, 20, 5, padding=2)),
]


@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (3, 8), (2, 1), (1, 3)])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("form", "build"), FORMS, ids=lambda value: getattr(value, "__name__", ""))
def test_each_form_of_a_convolution_is_the_stock_layer(
    form: Callable[..., Tensor],
    build: Callable[[], nn.Module],
    trained: bool,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_kernels, "LARGE_KERNEL", 1000)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    random = torch.Generator().manual_seed(sum(shape))
    layer = build().double().to(memory_format=torch.channels_last)
    channels = layer.get_parameter("weight").shape[1]
    images = torch.randn(6, channels, *shape, dtype=torch.float64, generator=random, requires_grad=True)
    expected = everything(layer, images, trained)
    assert faster_form(layer) is form
    use_cpu_kernels(layer)
    torch.testing.assert_close(everything(layer, images, trained), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [5, 8])
def test_gradients_of_the_transposed_convolution_are_torchs(size: int) -> None:
    random = torch.Generator().manual_seed(size)
    layer = nn.ConvTranspose2d(3, 2, 5, 2, padding=2, output_padding=1).double()
    images = torch.randn(4, 3, size, size + 1, dtype=torch.float64, generator=random, requires_grad=True)
    inputs = [images, *layer.parameters()]
    plain = layer(images)
    assert faster_form(layer) is transposed_convolution
    use_cpu_kernels(layer)
    outputs = layer(images)
    weights = torch.randn(outputs.shape, dtype=torch.float64, generator=random)
    for ours, theirs in zip(
        torch.autograd.grad(outputs, inputs, weights), torch.autograd.grad(plain, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_amx", [True, False])
def test_the_reference_networks_get_each_form_and_keep_their_state(
    has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    generator, critic = Generator(NetworkConfig(), (1, 28, 28)), Critic(NetworkConfig(), (1, 28, 28))
    before = {**generator.state_dict(), **critic.state_dict()}
    forms = [faster_form(layer) for network in (generator, critic) for layer in network.modules()]
    forms_used = [form for form in forms if form is not None]
    assert forms_used == [transposed_convolution] * 2 + [convolution_by_taps] + [convolution_by_products] * has_amx
    for network in (generator, critic):
        use_cpu_kernels(network)
    after = {**generator.state_dict(), **critic.state_dict()}
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
