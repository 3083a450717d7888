"""Feature spaces that images are scored in. Another one is a file in this folder and a line in SPACES."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.evaluation.features.base import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.features.inception import InceptionFeatures, default_inception_weights, find_weights
from pipeline.evaluation.features.mnist import MnistFeatures

__all__ = ["FORWARD_SIZE", "FeatureExtractor", "default_inception_weights", "find_weights", "load_features"]

SPACES: dict[str, Callable[[torch.device, tuple[int, int, int], str | Path | None], FeatureExtractor]] = {
    "mnist": lambda device, image_shape, _: MnistFeatures(device, image_shape),
    "inception": InceptionFeatures,
}


def load_features(
    name: str, device: torch.device, image_shape: tuple[int, int, int], inception_weights: str | Path | None = None
) -> FeatureExtractor:
    """The extractor called `name` for images of shape (C, H, W).

    Raises:
        UserError: unknown name, images that it cannot score, or weights that are missing or damaged.
    """
    if name not in SPACES:
        raise UserError(f"evaluation.features holds {name!r}: choose from {', '.join(SPACES)}")
    return SPACES[name](device, image_shape, inception_weights)
