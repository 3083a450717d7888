"""FID from sums over images, its confidence interval, and an estimate of the FID of infinitely many images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import naming
from pipeline.evaluation.interruption import check_interrupted
from pipeline.evaluation.metrics.states import Tensors
from pipeline.rng import seeded

FEWEST_IMAGES = 40  # whose FID gets an interval
NORMAL_95 = 1.96  # the 97.5 % point of the normal distribution
ROWS_TOGETHER = 8192  # images whose coordinates are in memory together
MOST_PARTS = 4  # into which the images are divided to see how FID falls with their number
IMAGES_PER_FEATURE = 4  # at least, in the smallest of these parts


@dataclass(frozen=True)
class Moments:
    """Mean [d] and unbiased covariance [d, d] of `num_images` feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    num_images: int

    @classmethod
    def of_features(cls, features: Tensor) -> Self:
        """Computes them from features [n, d], n >= 2."""
        features = features.double()
        return cls(features.mean(0), features.T.cov(), len(features))

    @classmethod
    def of_sums(cls, sums: Tensors) -> Self:
        """Computes them from the tensors of `states.Sums`.

        The subtraction cancels the squared mean, so the covariance has 16 digits less those of (mean / deviation)^2:
        its error is 1e-14 of the largest variance for features that follow a ReLU.
        """
        num_images = int(sums["count"])
        mean = sums["sum"] / num_images
        covariance = (sums["products"] - num_images * mean.outer(mean)) / (num_images - 1)
        return cls(mean, covariance, num_images)

    @classmethod
    def of_file(cls, path: Path, width: int) -> Self:
        """Reads published moments of `width` features: `mu` and `sigma` of an .npz file, as pytorch-fid and StudioGAN
        write them. It does not tell of how many images they are: `num_images` is 0. Raises UserError."""
        problem = f"evaluation.reference_statistics {path} cannot be used"
        with naming(problem, "; give an .npz file with mu [d] and sigma [d, d]"):
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            if mean.shape != (width,) or covariance.shape != (width, width):
                raise ValueError(f"mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, of {width} features")
            if not (mean.isfinite().all() and covariance.isfinite().all() and covariance.allclose(covariance.T)):
                raise ValueError("sigma is not symmetric, or a number is not finite")
        return cls(mean, covariance, 0)

    @cached_property
    def factor(self) -> Tensor:
        """A matrix A [d, d] with A A^T = covariance, without directions whose variance is nothing but rounding."""
        variances, directions = torch.linalg.eigh(self.covariance)
        rounding = variances[-1] * len(variances) * torch.finfo(torch.float64).eps
        factor: Tensor = directions * torch.where(variances > rounding, variances, 0).sqrt()
        return factor


def frechet_distance(ours: Moments, theirs: Moments) -> float:
    """Returns FID, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    With C1 = A A^T and C2 = B B^T the trace of the root is the sum of the singular values of A^T B. torch-fidelity
    takes roots of the eigenvalues of C1 C2, where 1e-16 of rounding becomes 1e-8 if a covariance has less than full
    rank. FID's expectation falls as the number of images grows, so only scores of equally many images compare.
    """
    root = torch.linalg.svdvals(ours.factor.T @ theirs.factor).sum()
    traces = ours.covariance.trace() + theirs.covariance.trace()
    return float((ours.mean - theirs.mean).square().sum() + traces - 2 * root)


def frechet_interval(
    features: Tensor, num_images: int, score: float, reference: Moments, seed: int
) -> tuple[float, float] | None:
    """Returns a 95 % confidence interval around the FID `score` of `num_images` images, from the features [n, d] of all
    of them or of a sample; None for fewer than FEWEST_IMAGES images.

    It is for the mean FID of equally many images of the same source against the same reference: FID's bias by the
    number of images is in both ends, and what other real images would change is not covered. In simulations (Gaussians,
    d = 128, 2,000 and 10,000 images, null to FID 50) it held the mean 94 to 97 times in 100.
    """
    if len(features) < FEWEST_IMAGES:
        return None
    margin = NORMAL_95 * frechet_variance(features, num_images, reference, seed) ** 0.5
    return score - margin, score + margin


def frechet_variance(features: Tensor, num_images: int, reference: Moments, seed: int) -> float:
    """Returns the variance of the FID of `num_images` images over repeated draws, from the features [n, d] of one draw.

    It is the jackknife's, which leaves out one image after the other, by derivatives in the place of n distances. The
    influence psi1(x) is FID's derivative as mass moves to the image x, psi2(x, y) that of psi1(x) as mass moves to y,
    so FID without x is FID - psi1(x) / n + psi2(x, x) / (2 n^2). The variance of psi1(x) - psi2(x, x) / (2 n), divided
    by N, counts twice what pairs of images contribute (Efron & Stein 1981, The jackknife estimate of variance). Near
    the null that is nearly all, and an interval would be 1.4 times too wide: so the mean square over pairs is
    subtracted.

    With M = B^T C B for the reference's covariance B B^T and the images' C, s the roots of M's eigenvalues and a, b the
    coordinates of x and y along its eigenvectors, of variance 1:
        psi1(x) = 2 (m - m_r) (x - m) + |x - m|^2 - sum_i s_i a_i^2 + a constant
        psi2(x, y) = sum_ij s_i s_j / (s_i + s_j) a_i b_i a_j b_j + 2 sum_i s_i a_i b_i
                     - sum_i s_i (a_i^2 + b_i^2) / 2 + sum_i s_i / 2
    where a_i b_i comes out too small by sqrt(1 - d / n), as the coordinates are of the same images. With fewer than 2 d
    images that cannot be undone: nothing is subtracted then, and the variance is too large.
    """
    count, ours = len(features), Moments.of_features(features)
    check_interrupted()
    squares, directions = torch.linalg.eigh(reference.factor.T @ ours.covariance @ reference.factor)
    along = squares > squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    roots = squares[along].sqrt()
    coordinates = reference.factor @ directions[:, along] / roots
    coupling = roots.outer(roots) / (roots[:, None] + roots)
    shrinkage = 1 - len(roots) / (count - 1)
    singles, pairs = [], []
    order = torch.randperm(count, generator=seeded(seed, "pairs of images")).to(features.device)
    for part in order.tensor_split(-(-count // ROWS_TOGETHER)):
        check_interrupted()
        centred = features[part].double() - ours.mean
        of_x = centred @ coordinates
        of_xx = of_x.square()
        length = of_xx @ roots
        first = 2 * centred @ (ours.mean - reference.mean) + centred.square().sum(1) - length
        singles.append(first - (((of_xx @ coupling) * of_xx).sum(1) + length) / (2 * count))
        of_xy = of_x * of_x.roll(1, 0)  # y is the image before x in the random order
        second = ((of_xy @ coupling) * of_xy).sum(1) / shrinkage + 2 * (of_xy @ roots) / shrinkage**0.5
        pairs.append(second - (length + length.roll(1) - roots.sum()) / 2)
    of_one = torch.cat(singles).var().item()
    of_pairs = torch.cat(pairs).square().mean().item() if shrinkage >= 0.5 else 0.0
    of_pairs = min(of_pairs, count * of_one)
    return (of_one - of_pairs / count) / num_images + of_pairs / (2 * num_images**2)


def frechet_extrapolated(
    features: Tensor, num_images: int, score: float, reference: Moments, seed: int
) -> float | None:
    """Estimates the FID of infinitely many images of the same source against a fixed reference, from the FID `score` of
    `num_images` images and the features [n, d] of all of them or of a sample.

    FID's expectation is a constant and, to first order, a multiple of 1 / N: a line in 1 / N is fitted to the FIDs of
    several N by least squares and read at 0 (Chong & Forsyth 2020, arXiv 1911.07023). Here the images are divided at
    random into 2, 3 and 4 parts, and a point is the mean over the parts: since every point is of all images, what is
    peculiar to them moves the line and not its slope. None if one of four parts has fewer than 4 d images, as terms of
    1 / N^2 bend the line downwards (for N(shift, I) against N(0, I) at a true 2.40, d = 128, parts of 1.01 d images
    give -0.04 in the mean, those of 4 d 2.32). The bias by the number of reference images remains.
    """
    if len(features) // MOST_PARTS < IMAGES_PER_FEATURE * features.shape[1]:
        return None
    order = torch.randperm(len(features), generator=seeded(seed, "extrapolation parts")).to(features.device)
    inverse_counts, scores = [1 / num_images], [score]
    for count in range(2, MOST_PARTS + 1):
        of_parts = []
        for part in order.tensor_split(count):
            check_interrupted()
            of_parts.append(frechet_distance(Moments.of_features(features[part]), reference))
        inverse_counts.append(count / len(features))
        scores.append(float(np.mean(of_parts)))
    return float(np.polynomial.Polynomial.fit(inverse_counts, scores, 1)(0.0))
