"""What a classifier sees: which classes there are, how sure it is of them, and FID within each."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.metrics.frechet import Moments, frechet_distance
from pipeline.evaluation.metrics.states import Poll, State, never_ends


def class_scores(fake: State, real: State, poll: Poll = never_ends) -> dict[str, Tensor]:
    """Compares the classes of both sides, given as `states.ClassSums`. Both are classed by the classifier, so that its
    mistakes do not count against the images.

    Returns "class_histogram" and "class_histogram_real" [num_classes], which sum to 1; "class_total_variation" of the
    two, half their L1 distance, 0 equal and 1 disjoint; "confidence_mean", the mean probability of the generated
    images' likeliest class; "class_accuracy", how often that is the class that was asked for: GAN-test (Shmelkov et al.
    2018, arXiv 1807.09499); "fid_per_class" [num_classes], NaN for a class with too few images on either side for a
    covariance of full rank. NaN where a side has no images.
    """
    shares, real_shares = (side["count"].double() / side["count"].sum() for side in (fake, real))
    return {
        "class_histogram": shares,
        "class_histogram_real": real_shares,
        "class_total_variation": (shares - real_shares).abs().sum() / 2,
        "confidence_mean": fake["confidence"] / fake["count"].sum(),
        "class_accuracy": fake["recognised"] / fake["labelled"],
        "fid_per_class": fid_per_class(fake, real, poll),
    }


def fid_per_class(fake: State, real: State, poll: Poll = never_ends) -> Tensor:
    """Returns FID within each class [num_classes], as `class_scores` describes it."""
    distances = torch.full((len(fake["count"]),), torch.nan, dtype=torch.float64)
    for index in range(len(distances)):
        poll()
        sides = fake, real
        if all(index < len(side["sum"]) and side["count"][index] > side["sum"].shape[1] for side in sides):
            of_class = [{name: side[name][index] for name in ("count", "sum", "products")} for side in sides]
            distances[index] = frechet_distance(*map(Moments.of_sums, of_class))
    return distances
