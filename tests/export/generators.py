"""Generators with random weights, whose images a flip would change."""

from __future__ import annotations

from pipeline.config import NetworkConfig
from pipeline.models.networks import Generator, initialise
from pipeline.rng import seeded


def random_generator(num_classes: int = 0, shape: tuple[int, int, int] = (1, 28, 28)) -> Generator:
    """A generator with random weights, biases and moving statistics, in eval mode."""
    generator = Generator(NetworkConfig(latent_dim=6, width=0.1), shape, num_classes)
    initialise(generator, seeded(num_classes, "weights"))
    random = seeded(num_classes, "norms")
    for name, tensor in generator.state_dict().items():
        if name.startswith("norms") and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 2, generator=random)
        elif name.endswith(("bias", "running_mean")):
            tensor.uniform_(-0.3, 0.3, generator=random)
    return generator.eval().requires_grad_(False)
