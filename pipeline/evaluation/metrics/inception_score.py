"""Inception Score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from pipeline.evaluation.metrics.base import SampleMetric


def inception_score(logits: Tensor, seed: int) -> tuple[float, float]:
    """Mean and deviation over 10 splits of exp(E[KL(p(y|x) || p(y))]) (Salimans et al. 2016, arXiv 1606.03498).

    Logits [n, k]; with n < 10 as many splits as images.
    """
    result = isc_features_to_metric(logits, splits=min(10, len(logits)), shuffle=True, rng_seed=seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


class InceptionScore(SampleMetric):
    """Of at most `keep` generated images: "is_mean" and "is_std", NaN without any. Real ones pass it by."""

    higher_is_better = True

    def __init__(self, num_classes: int, *, seed: int = 0, keep: int = 50_000, **options: Any) -> None:
        super().__init__(num_classes, keep, **options)
        self.seed = seed

    def update(self, logits: Tensor, real: bool = False, indices: Tensor | None = None) -> None:
        """Logits [n, num_classes] of the images with these indices: see SampleMetric.add."""
        if not real:
            self.add(logits, real, indices)

    def compute(self) -> dict[str, Tensor]:
        logits, _ = self.sample(real=False)
        found = inception_score(logits, self.seed) if len(logits) else (torch.nan, torch.nan)
        return dict(zip(("is_mean", "is_std"), torch.tensor(found, dtype=torch.float64), strict=True))
