"""Whether generated images are copies of training images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.metrics.base import Poll, SampleMetric, never_ends
from pipeline.evaluation.metrics.manifold import nearest_neighbours


def authenticity(features: Tensor, training: Tensor, poll: Poll = never_ends) -> float:
    """Share of images that are further from the training image nearest to them than that one is from the other training
    image nearest to it (Alaa et al. 2022, arXiv 2102.08921, the authenticity score).

    Features [m, d] and [n, d], m >= 1 and n >= 2. Copies of training images have 0, images far from all of them 1. What
    unseen real images have is the level to compare with, and less is suspicious where the images are good: those of an
    untrained generator, all alike, have little as well if they lie where training images are far apart.

    C_T (Meehan et al. 2020, arXiv 2004.05675) has the comparison with unseen images built in, as a z-score that grows
    with the number of images, and takes a partition whose cells must each hold enough of three sets. A share and its
    control are two numbers that anybody reads, for any number of images.
    """
    nearest, distances = nearest_neighbours(features, training, 1, poll)
    chosen, places = torch.unique(nearest[:, 0], return_inverse=True)
    _, own = nearest_neighbours(training[chosen], training, 2, poll)  # the nearest is the image itself
    return (distances[:, 0] > own[places, 1]).double().mean().item()


class Authenticity(SampleMetric):
    """ "authenticity" of at most `scored` generated images among at most `keep` training images, the real side; NaN
    with fewer than two of these or none of those."""

    higher_is_better = True

    def __init__(self, num_features: int, *, scored: int = 1_000, keep: int = 50_000, **options: Any) -> None:
        super().__init__(num_features, keep, **options)
        self.scored = scored

    def update(self, features: Tensor, real: bool, indices: Tensor | None = None) -> None:
        """Features [n, num_features] of the images with these indices: see SampleMetric.add."""
        self.add(features, real, indices)

    def compute(self) -> dict[str, Tensor]:
        (features, _), (training, _) = self.sample(real=False, count=self.scored), self.sample(real=True)
        found = torch.nan
        if len(features) and len(training) >= 2:
            found = authenticity(features, training, self.poll)
        return {"authenticity": torch.tensor(found, dtype=torch.float64)}

    @property
    def num_used(self) -> list[int]:
        generated, training = super().num_used
        return [min(generated, self.scored), training]
