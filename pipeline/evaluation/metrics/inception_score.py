"""Inception Score."""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric


def inception_score(logits: Tensor, seed: int) -> tuple[float, float]:
    """Mean and deviation over 10 splits of exp(E[KL(p(y|x) || p(y))]) (Salimans et al. 2016, arXiv 1606.03498).

    Logits [n, k]; with n < 10 as many splits as images.
    """
    result = isc_features_to_metric(logits, splits=min(10, len(logits)), shuffle=True, rng_seed=seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]
