"""Feature spaces that images are scored in. Another one is a file in this folder and a line in SPACES."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.features import dinov2, inception
from pipeline.evaluation.features.base import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.features.custom import load_module
from pipeline.evaluation.features.mnist import load_mnist
from pipeline.evaluation.features.own import load_own
from pipeline.models.user_networks import preserve_global_rng

__all__ = ["FORWARD_SIZE", "PUBLISHED", "FeatureExtractor", "load_all", "load_features"]

SPACES: dict[str, Callable[[Dataset, torch.device, EvaluationConfig], FeatureExtractor]] = {
    "mnist": load_mnist,
    "own": load_own,
    "inception": inception.load_inception,
    "dinov2": dinov2.load_dinov2,
}
"""Each raises UserError for a dataset that it does not speak for, before it does any work."""
PUBLISHED = {"inception": inception.WEIGHTS, "dinov2": dinov2.WEIGHTS}
"""The spaces that need a file of somebody else's."""


@preserve_global_rng
def load_features(name: str, dataset: Dataset, device: torch.device, config: EvaluationConfig) -> FeatureExtractor:
    """The extractor called `name` for a dataset's images.

    Raises:
        UserError: unknown name, a dataset that it does not speak for, or weights that are missing or damaged.
    """
    if name.startswith("torchscript:"):
        raise UserError(f"evaluation.features holds {name!r}: load the file in a module of yours, named as module:NAME")
    if ":" in name:
        return load_module(name, dataset, device)
    if name in SPACES:
        return SPACES[name](dataset, device, config)
    names = ", ".join(SPACES)
    raise UserError(f"evaluation.features holds {name!r}: choose from {names} and module:NAME")


def load_all(config: EvaluationConfig, dataset: Dataset, device: torch.device) -> list[FeatureExtractor]:
    """The extractors that the configuration names, whose weights are here. Raises UserError as `load_features` does."""
    extractors = [load_features(name, dataset, device, config) for name in config.features]
    names = [extractor.name for extractor in extractors]
    if len({*names}) < len(names):
        raise UserError(f"evaluation.features holds two spaces of one name ({', '.join(names)}): leave one out")
    return extractors
