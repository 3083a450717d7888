"""Scores as `torchmetrics.Metric`s over features, for loops of one's own: each a few lines over `metric.FeatureMetric`.
The formulae are functions in the files beside this one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.metrics.classes import class_scores
from pipeline.evaluation.metrics.frechet import Moments, frechet_distance
from pipeline.evaluation.metrics.inception_score import inception_score
from pipeline.evaluation.metrics.metric import FeatureMetric, States
from pipeline.evaluation.metrics.scores import KEEP, SAMPLE_SCORES, Options
from pipeline.evaluation.metrics.states import ClassSums, Sample, Sums

__all__ = [
    "Authenticity",
    "ClassScores",
    "FeatureMetric",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "ManifoldScores",
    "SlicedWasserstein",
]


class FrechetDistance(FeatureMetric):
    """FID of all images, NaN with fewer than two images of a side."""

    higher_is_better = False

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__({"sums": Sums(num_features)}, **options)

    def score(self, fake: States, real: States) -> float:
        sides = [side["sums"].state() for side in (fake, real)]
        return frechet_distance(*map(Moments.of_sums, sides)) if min(side["count"] for side in sides) > 1 else torch.nan


class SampleMetric(FeatureMetric):
    """The score `name` of SAMPLE_SCORES, of the features of at most `keep` images of either side; NaN of too few.

    Args:
        scored: most generated images that are scored; None: `keep`.
        seed, neighbours: see `scores.Options`.
        options: torchmetrics' own.
    """

    name: str
    keep = KEEP

    def __init__(
        self, num_features: int, *, keep: int | None = None, scored: int | None = None, **options: Any
    ) -> None:
        how = {name: options.pop(name) for name in ("seed", "neighbours") if name in options}
        keep = keep or self.keep
        super().__init__({"sample": Sample(num_features, keep)}, **options)
        self.most_fake, self.how = scored or keep, Options(**how)

    def score(self, fake: States, real: States) -> dict[str, float]:
        function = replace(SAMPLE_SCORES[self.name], most_fake=self.most_fake)
        return function(fake["sample"], real["sample"], self.how)[0]


class KernelDistance(SampleMetric):
    """KID: "kid_mean" and "kid_std"."""

    name, higher_is_better = "kid", False


class ManifoldScores(SampleMetric):
    """ "precision", "recall", "density" and "coverage", of as many images of either side."""

    name, keep, higher_is_better = "manifold", 10_000, True


class SlicedWasserstein(SampleMetric):
    """ "sliced_wasserstein", of as many images of either side."""

    name, keep, higher_is_better = "sliced_wasserstein", 10_000, False


class Authenticity(SampleMetric):
    """ "authenticity" of 1,000 generated images, or `scored`, among the training images: the real side."""

    name, higher_is_better = "authenticity", True

    def __init__(self, num_features: int, *, scored: int = 1_000, **options: Any) -> None:
        super().__init__(num_features, scored=scored, **options)


class InceptionScore(FeatureMetric):
    """ "is_mean" and "is_std" of at most `keep` generated images, NaN without any. Real ones pass it by."""

    higher_is_better = True

    def __init__(self, num_classes: int, *, seed: int = 0, keep: int = KEEP, **options: Any) -> None:
        super().__init__({"logits": Sample(num_classes, keep, "logits")}, **options)
        self.seed = seed

    def update(self, logits: Tensor, real: bool = False, indices: Tensor | None = None) -> None:  # type: ignore[override]
        """Takes logits [n, num_classes] of the images with these indices."""
        if not real:
            super().update(None, real, indices, logits)

    def score(self, fake: States, real: States) -> dict[str, float]:
        logits, _ = fake["logits"].first()
        values = inception_score(logits, self.seed) if len(logits) else (torch.nan, torch.nan)
        return dict(zip(("is_mean", "is_std"), values, strict=True))


class ClassScores(FeatureMetric):
    """What `class_scores` gives."""

    def __init__(self, num_features: int, num_classes: int, **options: Any) -> None:
        super().__init__({"classes": ClassSums(num_features, num_classes)}, **options)

    def score(self, fake: States, real: States) -> dict[str, Tensor]:
        return class_scores(fake["classes"].state(), real["classes"].state())
