"""Feature spaces that images are scored in. Another one is a file in this folder and a line in LOADERS."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.evaluation.features.base import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.features.inception import (
    InceptionFeatures,
    default_inception_weights,
    find_inception_weights,
)
from pipeline.evaluation.features.mnist import MnistFeatures

__all__ = ["FORWARD_SIZE", "FeatureExtractor", "default_inception_weights", "find_weights", "load_features"]

Loader = Callable[[torch.device, tuple[int, int, int], str | Path | None], FeatureExtractor]
"""The arguments of `load_features` behind the name."""

LOADERS: dict[str, Loader] = {
    "mnist": lambda device, shape, _: MnistFeatures(device, shape),
    "inception": lambda device, shape, given: InceptionFeatures(device, shape, find_inception_weights(given)),
}


def find_weights(names: Iterable[str], inception_weights: str | Path | None) -> Path | None:
    """The Inception v3 weight file where one of the feature spaces needs it: the path given, else a download.

    Raises:
        UserError: there is no such file, or it can't be downloaded.
    """
    return find_inception_weights(inception_weights) if InceptionFeatures.name in names else None


def load_features(
    name: str, device: torch.device, image_shape: tuple[int, int, int], inception_weights: str | Path | None = None
) -> FeatureExtractor:
    """The extractor called `name` for images of shape (C, H, W).

    Raises:
        UserError: unknown name, images that it cannot score, or weights that are missing or damaged.
    """
    if name not in LOADERS:
        raise UserError(f"evaluation.features holds {name!r}: choose from {', '.join(LOADERS)}")
    return LOADERS[name](device, image_shape, inception_weights)
