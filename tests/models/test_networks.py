"""The networks against Keras's geometry, written out in NumPy from its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.models.networks import Critic, Generator, initialise, mirror, mirror_state
from pipeline.rng import seeded
from tests.keras_reference import Array, keras_conv, keras_generator


def layers(network: torch.nn.Module, name: str) -> list[Any]:
    """A module list without the types that torch can't give its elements."""
    return list(getattr(network, name))


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

    # The reference has Keras's orientation.
    weights = {name: numpy(tensor) for name, tensor in mirror_state(generator, generator.state_dict()).items()}
    stages = [{"kernel": weights["dense.weight"].T, "bias": weights["dense.bias"]}]
    for i in range(4):
        names = {"moving_mean": "running_mean", "moving_variance": "running_var", "gamma": "weight", "beta": "bias"}
        stages.append({theirs: weights[f"norms.{i}.{ours}"] for theirs, ours in names.items()})
        kernel = weights[f"convolutions.{i}.weight"]
        # With stride 1 ours is a convolution with the kernel flipped.
        kernel = kernel.transpose(2, 3, 1, 0) if i < 2 else kernel[..., ::-1, ::-1].transpose(2, 3, 0, 1)
        stages.append({"kernel": kernel, "bias": weights[f"convolutions.{i}.bias"]})
    x = keras_generator(stages, (*generator.base, len(weights["norms.0.weight"])), numpy(latents)[0])
    images = generator(latents)
    np.testing.assert_allclose(numpy(images.flip(2, 3))[0].transpose(1, 2, 0), x, atol=1e-12)

    weights = {name: numpy(tensor) for name, tensor in mirror_state(critic, critic.state_dict()).items()}
    for i, stride in enumerate((2, 2, 2, 1)):
        x = np.where(x > 0, x, 0.2 * x)
        kernel = weights[f"convolutions.{i}.weight"].transpose(2, 3, 1, 0)
        x = keras_conv(x, kernel, weights[f"convolutions.{i}.bias"], stride)
    score = x.reshape(-1) @ weights["score.weight"][0] + weights["score.bias"][0]
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


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 24)])
def test_mirroring_twice_changes_nothing_and_moments_are_mirrored_as_their_parameters(
    shape: tuple[int, int, int],
) -> None:
    config = NetworkConfig(latent_dim=7, width=0.1)
    for network in (Generator(config, shape, 3), Critic(config, shape, 3)):
        mirrored = mirror_state(network, network.state_dict())
        changed = {name for name, tensor in network.state_dict().items() if not torch.equal(mirrored[name], tensor)}
        assert {"dense.weight"} <= changed or {"score.weight", "classes.0.weight"} <= changed
        assert not any("norms" in name or "classes.1" in name for name in changed)
        for name, tensor in network.state_dict().items():
            assert torch.equal(mirror(name, mirrored[name], network.base), tensor), name
            assert torch.equal(mirror(f"{name}.square_avg", tensor, network.base), mirrored[name]), name
        assert mirror("dense.weight.step", torch.tensor(3.0), network.base) == 3
        assert mirror("score.weight.step", torch.tensor(3.0), network.base) == 3


def test_weights_are_drawn_in_keras_orientation() -> None:
    """So that a seed's trajectory is what it was when weights were stored that way."""
    critic = Critic(NetworkConfig(width=0.1), (1, 28, 28))
    initialise(critic, seeded(0, "weights"))
    drawn = torch.empty_like(layers(critic, "convolutions")[0].weight)
    torch.nn.init.xavier_uniform_(drawn, generator=seeded(0, "weights"))
    assert torch.equal(layers(critic, "convolutions")[0].weight, drawn.flip(2, 3))
