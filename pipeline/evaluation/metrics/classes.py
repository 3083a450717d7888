"""What a classifier sees: which classes there are, how sure it is of them, and FID within each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.metrics.base import FeatureMetric, State
from pipeline.evaluation.metrics.frechet import Moments, frechet_distance

MOST_SUMS = 2**25
"""Numbers in the sums of products of a side (256 MB): of more classes or features there is no FID within classes."""


class ClassScores(FeatureMetric):
    """Both sides are classed by the classifier, so that its mistakes do not count against the images.

    Gives "class_histogram" and "class_histogram_real" [num_classes], which sum to 1; "class_total_variation" of the
    two, half their L1 distance, 0 equal and 1 disjoint; "confidence_mean", the mean probability of the generated
    images' likeliest class; "class_accuracy", how often that is the class that was asked for: GAN-test (Shmelkov et al.
    2018, arXiv 1807.09499); "fid_per_class" [num_classes], NaN for a class with too few images on either side for a
    covariance of full rank.
    """

    def __init__(self, num_features: int, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        summed = num_classes if num_classes * num_features**2 <= MOST_SUMS else 0
        for prefix in ("fake_", "real_"):
            self.add_state(f"{prefix}count", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{prefix}sum", torch.zeros(summed, num_features).double(), dist_reduce_fx="sum")
            products = torch.zeros(summed, num_features, num_features).double()
            self.add_state(f"{prefix}products", products, dist_reduce_fx="sum")
            for name in ("confidence", "labelled", "recognised"):
                self.add_state(prefix + name, torch.tensor(0.0).double(), dist_reduce_fx="sum")

    def update(self, features: Tensor, logits: Tensor, real: bool, labels: Tensor | None = None) -> None:
        """Features [n, d], logits [n, num_classes] and the classes asked for, int64 [n]."""
        prefix = "real_" if real else "fake_"
        count, total, products = (getattr(self, prefix + name) for name in ("count", "sum", "products"))
        classes, features = logits.argmax(1).to(self.device), features.detach().to(self.device, torch.float64)
        count += classes.bincount(minlength=len(count))
        for index in set(classes.tolist()) if len(total) else ():
            rows = features[classes == index]
            total[index] += rows.sum(0)
            products[index].addmm_(rows.T, rows)
        self._add(prefix + "confidence", logits.double().softmax(1).amax(1).sum())
        if labels is not None:
            self._add(prefix + "labelled", torch.tensor(len(labels)))
            self._add(prefix + "recognised", (classes == labels.to(self.device)).sum())

    def compute(self) -> dict[str, Tensor]:
        fake, real = self.side(real=False), self.side(real=True)
        shares, real_shares = (side["count"].double() / side["count"].sum() for side in (fake, real))
        return {
            "class_histogram": shares,
            "class_histogram_real": real_shares,
            "class_total_variation": (shares - real_shares).abs().sum() / 2,
            "confidence_mean": fake["confidence"] / fake["count"].sum(),
            "class_accuracy": fake["recognised"] / fake["labelled"],
            "fid_per_class": torch.tensor(
                [self._distance(index, fake, real) for index in range(len(shares))], dtype=torch.float64
            ),
        }

    def _add(self, name: str, value: Tensor) -> None:
        setattr(self, name, getattr(self, name) + value.to(self.device, torch.float64))

    def _distance(self, index: int, *sides: State) -> float:
        self.poll()
        if not all(index < len(side["sum"]) and side["count"][index] > side["sum"].shape[1] for side in sides):
            return torch.nan
        of_class = [{name: side[name][index] for name in ("count", "sum", "products")} for side in sides]
        return frechet_distance(*map(Moments.of_sums, of_class))
