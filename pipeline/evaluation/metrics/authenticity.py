"""Whether generated images are copies of training images."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.metrics.manifold import nearest_neighbours
from pipeline.evaluation.metrics.states import Poll, never_ends


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
