"""Spectral normalisation of the critic (Miyato et al. 2018, 1802.05957), added to a network that knows nothing of it.

torch.nn.utils.parametrizations.spectral_norm takes a power iteration in every forward pass of training, so also in each
micro-batch and in the generator's update, and starts from torch's global random numbers. Here there is one iteration
for each update of the critic, and its start is a function of the seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 15
"""Power iterations before the first update, as torch's takes them, because u is random at first."""
SINGULAR_VECTORS = (".u", ".v")
"""The ends of the buffers' names."""


def has_spectral_norm(names: Iterable[str]) -> bool:
    """Returns whether these are the names of the tensors of a critic that is normalised."""
    return any(name.endswith(SINGULAR_VECTORS) for name in names)


class SpectralNorm(nn.Module):
    """Divides a weight W, as a matrix of output channels by everything else, by u^T W v. The unit vectors u and v tend
    to the singular vectors of its largest singular value (Algorithm 1 there). Gradients take them as constants."""

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, random: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("u", torch.randn(len(weight), generator=random).to(weight))
        self.register_buffer("v", weight.new_zeros(weight[0].numel()))
        for _ in range(FIRST_ITERATIONS):
            self.iterate(weight)

    def forward(self, weight: Tensor) -> Tensor:
        # Not as a matrix product, because autocast would lower its precision.
        return weight / (torch.outer(self.u, self.v) * _matrix(weight)).sum()

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """Takes one power iteration."""
        matrix = _matrix(weight)
        self.v.copy_(F.normalize(self.u @ matrix, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))


def _matrix(weight: Tensor) -> Tensor:
    """Returns a weight as a matrix. Its columns are in the order of a convolution's channels-last memory, so that
    neither the weight nor its gradient is copied."""
    return weight.movedim(1, -1).flatten(1)


def use_spectral_norm(critic: nn.Module, random: torch.Generator) -> None:
    """Divides every weight of the critic's linear layers and convolutions by its spectral norm from now on. The weight
    itself becomes the parameter NAME.parametrizations.weight.original, with the buffers u and v beside it."""
    for layer in list(critic.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight.detach(), random))


def norms(critic: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Returns the critic's spectral norms, each with its weight before the division."""
    places = (module for module in critic.modules() if isinstance(module, parametrize.ParametrizationList))
    return [(cast(SpectralNorm, place[0]), place.original) for place in places]


def raw_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with the weights before the division, under the names that they have without it."""
    return {
        name.replace("parametrizations.weight.original", "weight"): tensor
        for name, tensor in tensors.items()
        if not name.endswith(SINGULAR_VECTORS)
    }


def follow_update(critic: nn.Module) -> None:
    """Takes one power iteration for each normalised weight. Its place is after an update of the critic and the clip,
    and before the next forward pass, which then divides by the norm of the weights that it uses."""
    for norm, weight in norms(critic):
        norm.iterate(weight)
