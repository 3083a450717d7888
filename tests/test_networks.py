"""The networks against Keras's geometry, written out in NumPy from its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.models.networks import Critic, Generator, initialise
from pipeline.rng import seeded
from tests.keras_reference import Array, keras_conv, keras_generator


def layers(network: torch.nn.Module, name: str) -> list[Any]:
    """A module list without the types that torch can't give its elements."""
    return list(getattr(network, name))


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
