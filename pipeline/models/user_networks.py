"""Networks of the user's own (`network.generator`, `network.critic`), and the choice between them and the reference's.

The NAME of `module:NAME` is called as the reference's classes are, with the network's settings, the images' shape
(C, H, W) and the number of classes (0: none), and returns a torch.nn.Module:

    generator: latents (n, latent_dim) in [-1, 1], labels int64 (n,) or None -> images (n, C, H, W), pixels in [0, 1]
    critic: such images -> scores (n,) and, with classes, logits (n, num_classes), else None

Images are the right way round there: the mirrored world is kept from these networks, and so is everything that is done
to the reference's layers. Their weights are what torch's layers draw for themselves, from a seed of the run's. They run
on a CPU too, where they are tried first and exports are drawn from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import NetworkConfig, imported
from pipeline.errors import UserError
from pipeline.models.networks import AnyGenerator, Critic, Generator, initialise

ImageShape = tuple[int, int, int]
drawing_nothing = torch.random.fork_rng(devices=[])
"""Decorates what builds networks: layers draw weights from torch's global random numbers, which are others' too."""
Network = TypeVar("Network", Generator, Critic)


class UserGenerator(AnyGenerator):
    """The network that `network.generator` names, as the pipeline takes it."""

    def __init__(
        self, config: NetworkConfig, image_shape: ImageShape, num_classes: int, random: torch.Generator | None
    ) -> None:
        super().__init__(config, image_shape, num_classes)
        self.network = _made("generator", config, image_shape, num_classes, random)

    def spec(self) -> dict[str, Any]:
        spec = super().spec()
        spec["network"] |= {"generator": self.config.generator, "options": self.config.options}
        return spec

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.network(latents, labels if self.num_classes else None)
        return images.flip(2, 3)


class UserCritic(nn.Module):
    """The network that `network.critic` names, as the pipeline takes it: see `Critic`."""

    def __init__(
        self, config: NetworkConfig, image_shape: ImageShape, num_classes: int, random: torch.Generator | None
    ) -> None:
        super().__init__()
        self.network = _made("critic", config, image_shape, num_classes, random)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        scores, logits = self.network(images.flip(2, 3))
        return scores, logits


@drawing_nothing
def build_generator(
    config: NetworkConfig, image_shape: ImageShape, num_classes: int = 0, random: torch.Generator | None = None
) -> AnyGenerator:
    """The generator that the settings name; its weights are drawn from `random`, or nobody cares which they are.

    Raises:
        UserError: see `Generator`; or the user's code is not there, fails, or makes something else.
    """
    if config.generator is not None:
        return UserGenerator(config, image_shape, num_classes, random)
    return _drawn(Generator(config, image_shape, num_classes), random)


@drawing_nothing
def build_critic(
    config: NetworkConfig, image_shape: ImageShape, num_classes: int = 0, random: torch.Generator | None = None
) -> Critic | UserCritic:
    """The critic: see `build_generator`."""
    if config.critic is not None:
        return UserCritic(config, image_shape, num_classes, random)
    return _drawn(Critic(config, image_shape, num_classes), random)


@drawing_nothing
def generator_of_spec(spec: dict[str, Any], code: str | None, source: Path) -> AnyGenerator:
    """The generator that a file describes.

    Args:
        code: module:NAME of the code that it takes if it is no network of the reference's. What the file says of it is
            never imported: only the caller can name it.
        source: the file.

    Raises:
        UserError: it takes code and the caller names none; see `build_generator`.
        ValueError, TypeError, KeyError: the file is damaged.
    """
    network, image_shape, num_classes = dict(spec["network"]), tuple(spec["image_shape"]), spec["num_classes"]
    named = network.pop("generator", None)
    if named is None:
        return Generator(NetworkConfig(**network), image_shape, num_classes, spec.get("doublings", 2))
    if code is None:
        raise UserError(
            f"{source}: holds a network of its user's own, {named}: if you trust that code, name it with "
            f"--network.generator {named}"
        )
    return build_generator(NetworkConfig(**network, generator=code), image_shape, num_classes)


def _drawn(network: Network, random: torch.Generator | None) -> Network:
    if random is not None:
        initialise(network, random)
    return network


def _made(
    role: str, config: NetworkConfig, image_shape: ImageShape, num_classes: int, random: torch.Generator | None
) -> nn.Module:
    key, name = f"network.{role}", getattr(config, role)
    make = imported(key, name)
    with torch.random.fork_rng(devices=[]):
        if random is not None:  # what layers draw themselves, they draw from the default generator
            torch.default_generator.manual_seed(random.initial_seed())
        try:
            network = make(config, image_shape, num_classes)
        except Exception as error:  # the user's code may raise anything
            raise UserError(f"{key}: {name} could not be made ({told(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{key} is {name!r}: that makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def told(error: Exception) -> str:
    """An error of the user's code in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
