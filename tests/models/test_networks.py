"""The networks against Keras's geometry, written out in NumPy from its definition."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.models.networks import Critic, Generator, generator_of_spec, initialise, mirror, mirror_state
from pipeline.rng import seeded
from tests.keras_reference import Array, keras_conv, keras_generator


def layers(network: torch.nn.Module, name: str) -> list[Any]:
    """A module list without the types that torch can't give its elements."""
    return list(getattr(network, name))


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 40, 40), pytest.param((1, 64, 64), marks=pytest.mark.slow)])
def test_whole_generator_and_critic_match_the_numpy_reference(shape: tuple[int, int, int]) -> None:
    config = NetworkConfig(latent_dim=5, width=0.06)
    generator, critic = Generator(config, shape).double().eval(), Critic(config, shape).double()
    doublings = len(generator.strides) - 2
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
    for i in range(doublings + 2):
        names = {"moving_mean": "running_mean", "moving_variance": "running_var", "gamma": "weight", "beta": "bias"}
        stages.append({theirs: weights[f"norms.{i}.{ours}"] for theirs, ours in names.items()})
        kernel = weights[f"convolutions.{i}.weight"]
        # With stride 1 ours is a convolution with the kernel flipped.
        kernel = kernel.transpose(2, 3, 1, 0) if i < doublings else kernel[..., ::-1, ::-1].transpose(2, 3, 0, 1)
        stages.append({"kernel": kernel, "bias": weights[f"convolutions.{i}.bias"]})
    x = keras_generator(stages, (*generator.base, len(weights["norms.0.weight"])), numpy(latents)[0])
    images = generator(latents)
    np.testing.assert_allclose(numpy(images.flip(2, 3))[0].transpose(1, 2, 0), x, atol=1e-12)

    weights = {name: numpy(tensor) for name, tensor in mirror_state(critic, critic.state_dict()).items()}
    images = images - 0.5  # augmented pixels may be negative
    x = x - 0.5
    for i, stride in enumerate([2] * (3 if doublings < 4 else doublings) + [1]):
        x = np.where(x > 0, x, 0.2 * x)
        kernel = weights[f"convolutions.{i}.weight"].transpose(2, 3, 1, 0)
        x = keras_conv(x, kernel, weights[f"convolutions.{i}.bias"], stride)
    score = x.reshape(-1) @ weights["score.weight"][0] + weights["score.bias"][0]
    np.testing.assert_allclose(numpy(critic(images)[0])[0], score, atol=1e-12)


def test_the_slope_at_a_black_pixel_is_that_of_keras() -> None:
    """LeakyReLU's derivative at 0 is its negative slope there, as in TensorFlow and torch; beside 0 it is 1."""
    critic = Critic(NetworkConfig(width=0.06), (1, 28, 28)).double()
    initialise(critic, seeded(3, "weights"))
    image = torch.rand(1, 28, 28, dtype=torch.float64, generator=seeded(3, "pixels"))
    images = torch.stack([image, image])
    images[:, :, ::2] = torch.tensor([0, 1e-30])[:, None, None, None]
    (slopes,) = torch.autograd.grad(critic(images.requires_grad_())[0].sum(), images)
    torch.testing.assert_close(slopes[0, :, ::2], 0.2 * slopes[1, :, ::2], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(slopes[0, :, 1::2], slopes[1, :, 1::2], rtol=1e-9, atol=1e-15)


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
    rebuilt = generator_of_spec(generator.spec(), None, Path("a file"))
    rebuilt.load_state_dict(generator.state_dict())


WIDE = (512, 512, 512, 256, 128, 128, 64, 32)
SIZES: dict[int, tuple[int, int, int, int]] = {
    # side: doublings, sides of the first maps; halvings, sides of the last maps
    **{16: (2, 4, 3, 2), 20: (2, 5, 3, 3), 24: (2, 6, 3, 3), 28: (2, 7, 3, 4)},
    **{32: (3, 4, 3, 4), 40: (3, 5, 3, 5), 48: (3, 6, 3, 6), 56: (3, 7, 3, 7)},
    **{64: (4, 4, 4, 4), 80: (4, 5, 4, 5), 96: (4, 6, 4, 6), 112: (4, 7, 4, 7)},
    **{128: (5, 4, 5, 4), 160: (5, 5, 5, 5), 192: (5, 6, 5, 6), 224: (5, 7, 5, 7), 256: (6, 4, 6, 4)},
}


@pytest.mark.parametrize("side", SIZES)
def test_depth_follows_the_size(side: int) -> None:
    """Shapes and parameters of every size, counted layer by layer."""
    doublings, first, halvings, last = SIZES[side]
    with torch.device("meta"):
        generator, critic = (network(NetworkConfig(), (3, side, side)) for network in (Generator, Critic))
        images = generator(torch.zeros(2, 100))
        scores, _ = critic(images)
    assert (images.shape, scores.shape) == ((2, 3, side, side), (2,))
    assert (generator.base, critic.base) == ((first, first), (last, last))
    before, after = WIDE[-2 - doublings :], (32, 64, 128, 256, 512, 512, 512)[: halvings + 1]
    sizes = 101 * first**2 * before[0] + sum(2 * count for count in before)
    sizes += sum((25 * one + 1) * other for one, other in zip(before, (*before[1:], 3), strict=True))
    assert sum(weight.numel() for weight in generator.parameters()) == sizes
    sizes = (
        1 + last**2 * after[-1] + sum((25 * one + 1) * other for one, other in zip((3, *after), after, strict=False))
    )
    assert sum(weight.numel() for weight in critic.parameters()) == sizes


@pytest.mark.parametrize(("side", "generator_size", "critic_size"), [
    (28, 1_302_403, 1_082_177), (32, 1_902_467, 1_082_177), (64, 5_594_243, 4_363_585), (256, 18_704_515, 17_471_809),
])  # fmt: skip
def test_parameter_counts_of_colour_images(side: int, generator_size: int, critic_size: int) -> None:
    with torch.device("meta"):
        networks = Generator(NetworkConfig(), (3, side, side)), Critic(NetworkConfig(), (3, side, side))
    counts = tuple(sum(weight.numel() for weight in network.parameters()) for network in networks)
    assert counts == (generator_size, critic_size)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 30, 28), "--size 28 or --size 32"),
        ((3, 36, 36), "--size 32 or --size 40"),
        ((3, 300, 300), "--size 256"),
        ((3, 128, 48), "--size 48 or --size 128"),
        ((1, 3, 3), "--size 4"),
    ],
)
def test_sides_that_no_doublings_reach_are_refused_with_the_nearest(shape: tuple[int, int, int], sizes: str) -> None:
    with pytest.raises(
        UserError, match=rf"{shape[1]} x {shape[2]} \(height x width\): .*\(prepare the dataset with {sizes}\)$"
    ):
        Generator(NetworkConfig(), shape)


def test_every_side_from_16_to_256_has_networks_or_is_refused() -> None:
    sides = set()
    with torch.device("meta"):
        for side in range(16, 257):
            with contextlib.suppress(UserError):
                sides.add(Generator(NetworkConfig(), (1, side, side)).image_shape[1])
    assert sides == set(SIZES)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 48)])
def test_files_of_before_double_twice(shape: tuple[int, int, int]) -> None:
    """They say nothing of depth: 64 x 48 images had a base of 16 x 12."""
    spec = {"network": {"latent_dim": 7, "width": 0.1}, "image_shape": list(shape), "num_classes": 0}
    generator = generator_of_spec(spec, None, Path("a file"))
    assert isinstance(generator, Generator)
    assert generator.base == (shape[1] // 4, shape[2] // 4)
    assert generator(torch.zeros(2, 7)).shape == (2, *shape)
    assert generator.spec() == spec, "fingerprints are of it"
    deeper = spec | {"image_shape": [3, 64, 64], "doublings": 4}
    assert generator_of_spec(deeper, None, Path("a file")).spec() == deeper
    for wrong in (1, 7, 3.5, "2"):
        with pytest.raises(ValueError, match="2 to 6 times"):
            generator_of_spec(spec | {"doublings": wrong}, None, Path("a file"))
    with pytest.raises(ValueError, match="don't reach"):
        generator_of_spec(spec | {"image_shape": [1, 30, 28]}, None, Path("a file"))


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
