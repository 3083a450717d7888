"""The networks against Keras's geometry, written out in NumPy from its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import networks
from pipeline.config import NetworkConfig, UserError
from pipeline.networks import (
    Critic,
    Generator,
    MirroredConv2d,
    MirroredConvTranspose2d,
    SameConv2d,
    initialise,
)
from pipeline.sampling import seeded
from tests.keras_reference import Array, keras_conv, keras_conv_transpose, keras_generator


def layers(network: torch.nn.Module, name: str) -> list[Any]:
    """A module list without the types that torch can't give its elements."""
    return list(getattr(network, name))


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


@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (3, 8), (2, 1)])
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
            patch.setattr(networks, "LARGE_KERNEL", 0)
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


@pytest.mark.parametrize("training", [True, False])
def test_several_batches_at_once_are_those_batches_one_by_one(training: bool) -> None:
    """Images and moving averages."""
    config = NetworkConfig(latent_dim=5, width=0.06)
    together, alone = (Generator(config, (1, 28, 28)).double().train(training) for _ in range(2))
    alone.load_state_dict(together.state_dict())
    latents = torch.rand(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = together(latents.flatten(0, 1), num_batches=3)
    torch.testing.assert_close(images, torch.cat([alone(batch) for batch in latents]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(alone(latents.flatten(0, 1)), images) != training, "statistics are each batch's own"


def test_whole_generator_and_critic_match_the_numpy_reference() -> None:
    config = NetworkConfig(latent_dim=5, width=0.06)
    generator, critic = Generator(config, (1, 28, 28)).double().eval(), Critic(config, (1, 28, 28)).double()
    for network in (generator, critic):
        initialise(network, seeded(3, "weights"))
    random = torch.Generator().manual_seed(1)
    for norm in layers(generator, "norms"):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.data.normal_(generator=random)
        norm.running_var.uniform_(0.5, 2, generator=random)
    latents = torch.rand(1, 5, dtype=torch.float64, generator=random)

    def numpy(tensor: torch.Tensor) -> Array:
        return tensor.detach().numpy()

    stages = [{"kernel": numpy(generator.dense.weight).T, "bias": numpy(generator.dense.bias)}]
    for i, (norm, convolution) in enumerate(
        zip(layers(generator, "norms"), layers(generator, "convolutions"), strict=True)
    ):
        moving = {"moving_mean": numpy(norm.running_mean), "moving_variance": numpy(norm.running_var)}
        stages.append({"gamma": numpy(norm.weight), "beta": numpy(norm.bias)} | moving)
        weight = convolution.weight.detach()
        kernel = weight.permute(2, 3, 1, 0) if i < 2 else weight.flip(2, 3).permute(2, 3, 0, 1)
        stages.append({"kernel": kernel.numpy(), "bias": numpy(convolution.bias)})
    x = keras_generator(stages, generator.base, numpy(latents)[0])
    images = generator(latents)
    np.testing.assert_allclose(numpy(images)[0].transpose(1, 2, 0), x, atol=1e-12)

    for convolution, stride in zip(layers(critic, "convolutions"), (2, 2, 2, 1), strict=True):
        x = np.where(x > 0, x, 0.2 * x)
        weight = convolution.weight.detach().permute(2, 3, 1, 0).numpy()
        x = keras_conv(x, weight, numpy(convolution.bias), stride)
    score = x.reshape(-1) @ numpy(critic.score.weight)[0] + numpy(critic.score.bias)[0]
    np.testing.assert_allclose(numpy(critic(images)[0])[0], score, atol=1e-12)


def test_reference_parameter_counts() -> None:
    generator, critic = Generator(NetworkConfig(), (1, 28, 28)), Critic(NetworkConfig(), (1, 28, 28))
    counted = [value for name, value in generator.state_dict().items() if "num_batches_tracked" not in name]
    assert sum(value.numel() for value in counted) == 1_301_505
    assert sum(value.numel() for value in critic.parameters()) == 1_080_577
    assert {(norm.eps, norm.momentum) for norm in layers(generator, "norms")} == {(1e-3, 0.01)}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 48)])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_shapes_follow_the_dataset(shape: tuple[int, int, int], num_classes: int) -> None:
    config = NetworkConfig(latent_dim=7, width=0.25)
    generator, critic = Generator(config, shape, num_classes), Critic(config, shape, num_classes)
    labels = torch.tensor([0, 1, 2])
    images = generator(torch.zeros(3, 7), labels)
    scores, logits = critic(images)
    assert images.shape == (3, *shape)
    assert scores.shape == (3,)
    assert (logits.shape == (3, 10)) if num_classes else (logits is None)
    rebuilt = Generator.from_spec(generator.spec())
    rebuilt.load_state_dict(generator.state_dict())


def test_an_image_size_that_cannot_be_doubled_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"30 x 28.*multiples of 4"):
        Generator(NetworkConfig(), (1, 30, 28))


@pytest.mark.parametrize("seed", [0, 1])
def test_initialisation_is_glorot_uniform_and_a_function_of_the_seed(seed: int) -> None:
    critics = [Critic(NetworkConfig(), (1, 28, 28)) for _ in range(2)]
    for critic in critics:
        initialise(critic, seeded(seed, "weights"))
    first, second = (layers(critic, "convolutions")[1] for critic in critics)
    weight = first.weight
    limit = (6 / (25 * 32 + 25 * 64)) ** 0.5
    assert torch.equal(weight, second.weight)
    assert weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert not first.bias.any()
