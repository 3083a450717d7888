"""FID from sums over images, its confidence interval, and what it would be of infinitely many images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.metrics.states import Poll, State, never_ends
from pipeline.rng import seeded

JACKKNIFE_GROUPS = 20
STUDENT_T_95 = 2.093
"""97.5 % point of Student's t with JACKKNIFE_GROUPS - 1 degrees of freedom."""
MOST_PARTS = 4
"""Parts into which the images are dealt at most to see how FID falls with their number."""


@dataclass(frozen=True)
class Moments:
    """Mean [d] and unbiased covariance [d, d] of `num_images` feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    num_images: int

    @classmethod
    def of_features(cls, features: Tensor) -> Self:
        """Features [n, d], n >= 2."""
        features = features.double()
        return cls(features.mean(0), features.T.cov(), len(features))

    @classmethod
    def of_sums(cls, state: State) -> Self:
        """Of the sums of one side: `states.Sums`.

        What cancels in the subtraction is the squared mean, so the covariance keeps 16 digits less those of
        (mean / deviation)^2: 1e-14 of the largest variance for the features of networks, which follow a ReLU.
        """
        num_images = int(state["count"])
        mean = state["sum"] / num_images
        covariance = (state["products"] - num_images * mean.outer(mean)) / (num_images - 1)
        return cls(mean, covariance, num_images)


class FrechetReference:
    """Moments that many others are compared with: their covariance is factored once."""

    def __init__(self, moments: Moments) -> None:
        self.moments, self._factor = moments, _factor(moments.covariance)

    def distance(self, ours: Moments) -> float:
        """FID, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, equation 6).

        With C1 = A A^T and C2 = B B^T the trace of the root is the sum of the singular values of A^T B. torch-fidelity
        takes roots of the eigenvalues of C1 C2, in which 1e-16 of rounding becomes 1e-8 where a covariance has less
        than full rank: then its result depends on the order of sums (4e-8 seen), and this one does not (1e-13).
        Its expectation falls as the number of images grows, so compare only scores of equally many images.
        """
        theirs = self.moments
        root = torch.linalg.svdvals(_factor(ours.covariance).T @ self._factor).sum()
        traces = ours.covariance.trace() + theirs.covariance.trace()
        return float((ours.mean - theirs.mean).square().sum() + traces - 2 * root)


def _factor(covariance: Tensor) -> Tensor:
    """A [d, d] with A A^T = covariance; directions whose variance is nothing but rounding get none."""
    variances, directions = torch.linalg.eigh(covariance)
    rounding = variances[-1] * len(variances) * torch.finfo(torch.float64).eps
    factor: Tensor = directions * torch.where(variances > rounding, variances, 0).sqrt()
    return factor


def frechet_distance(ours: Moments, theirs: Moments) -> float:
    return FrechetReference(theirs).distance(ours)


def frechet_interval(
    features: Tensor, num_images: int, score: float, reference: FrechetReference, seed: int, poll: Poll = never_ends
) -> tuple[float, float] | None:
    """95 % confidence interval of the FID `score` of `num_images` images against a fixed reference, from the features
    [n, d] of all of them or of a sample.

    Delete-a-group jackknife: the images are dealt at random into 20 groups, and the spread of the 20 FIDs with one
    group left out gives the standard error, which falls as the root of the number of images. A bootstrap repeats
    images, which adds a bias of the size of FID's own and centres the interval beside the score (75 % above it for
    1,000 digits against digits); here the bias is the same in all 20. The interval is thus for the mean score of as
    many other images of the same source, not for infinitely many. It costs 20 distances, as the moments of the rest
    follow from those of the whole by subtraction. Near the floor it errs on the wide side (1.35 times the deviation of
    repeated samples). None with fewer than two images a group.
    """
    if len(features) < 2 * JACKKNIFE_GROUPS:
        return None
    mean = features.double().mean(0)
    centred = features.double() - mean
    scatter = centred.T @ centred
    scores = []
    for group in torch.randperm(len(features), generator=seeded(seed, "jackknife groups")).chunk(JACKKNIFE_GROUPS):
        poll()
        left_out = centred[group.to(centred.device)]
        rest = len(features) - len(left_out)
        shift = -left_out.sum(0) / rest
        covariance = (scatter - left_out.T @ left_out - rest * shift.outer(shift)) / (rest - 1)
        scores.append(reference.distance(Moments(mean + shift, covariance, rest)))
    margin = STUDENT_T_95 * float(np.std(scores)) * (len(scores) - 1) ** 0.5 * (len(features) / num_images) ** 0.5
    return score - margin, score + margin


def frechet_extrapolated(
    features: Tensor, num_images: int, score: float, reference: FrechetReference, seed: int, poll: Poll = never_ends
) -> float | None:
    """FID of infinitely many images of the same source against a fixed reference, from the FID `score` of `num_images`
    and the features [n, d] of all of them or of a sample.

    FID's expectation is a constant and, to first order, a multiple of 1 / N: a line in 1 / N is laid through the FIDs
    of several N by least squares and read at 0 (Chong & Forsyth 2020, arXiv 1911.07023). They draw each N's images at
    random; here the images are dealt at random into 2, 3 and 4 parts and a point is the mean over the parts. Every
    point is then of all images, so what is peculiar to them moves the whole line and not its slope. The bias
    by the reference's own number of images remains. None where a fourth of the images is no more than there are
    features: covariances of less than full rank are on no such line.
    """
    if len(features) // MOST_PARTS <= features.shape[1]:
        return None
    order = torch.randperm(len(features), generator=seeded(seed, "extrapolation parts")).to(features.device)
    places, scores = [1 / num_images], [score]
    for count in range(2, MOST_PARTS + 1):
        found = []
        for part in order.tensor_split(count):
            poll()
            found.append(reference.distance(Moments.of_features(features[part])))
        places.append(count / len(features))
        scores.append(float(np.mean(found)))
    return float(np.polynomial.Polynomial.fit(places, scores, 1)(0.0))
