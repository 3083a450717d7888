"""Scores of images by their features: pure functions of tensors gathered in image order.

Formulae come from torch-fidelity where those serve; none of them touches the global random state. Moments and distances
are float64. Importing this imports torch-fidelity and with it torchvision: only what scores does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from pipeline.rng import seeded

JACKKNIFE_GROUPS = 20
STUDENT_T_95 = 2.093
"""97.5 % point of Student's t with JACKKNIFE_GROUPS - 1 degrees of freedom."""
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 5
Poll = Callable[[], object]
"""Called between parts of a long computation; it ends one by raising."""
ROWS = 1000
"""Rows of a distance matrix held at once (80 MB against 10,000 columns)."""


@dataclass(frozen=True)
class Moments:
    """Mean [d] and unbiased covariance [d, d] of `num_images` feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    num_images: int


def moments(features: Tensor) -> Moments:
    """Features [n, d], n >= 2."""
    features = features.double()
    return Moments(features.mean(0), features.T.cov(), len(features))


def frechet_distance(ours: Moments, theirs: Moments) -> float:
    """FID, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    Its expectation falls as the number of images grows, so compare only scores of equally many images.
    """
    statistics = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (ours, theirs)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def frechet_interval(
    features: Tensor, reference: Moments, seed: int, poll: Poll = lambda: None
) -> tuple[float, float] | None:
    """95 % confidence interval of the FID of images with these features [n, d] against a fixed reference.

    Delete-a-group jackknife: the images are dealt at random into 20 groups, and the spread of the 20 FIDs with one
    group left out gives the standard error. A bootstrap repeats images, which adds a bias of the size of FID's own and
    centres the interval beside the score (75 % above it for 1,000 digits against digits); here the bias is the same in
    all 20. The interval is thus for the mean score of as many other images of the same source, not for infinitely many.
    It costs 20 distances, as the moments of the rest follow from those of the whole by subtraction. Near the floor it
    errs on the wide side (1.35 times the deviation of repeated samples). None with fewer than two images a group.
    """
    if len(features) < 2 * JACKKNIFE_GROUPS:
        return None
    mean = features.double().mean(0)
    centred = features.double() - mean
    scatter = centred.T @ centred
    scores = []
    for group in torch.randperm(len(features), generator=seeded(seed, "jackknife groups")).chunk(JACKKNIFE_GROUPS):
        poll()
        left_out = centred[group]
        num_images = len(features) - len(left_out)
        shift = -left_out.sum(0) / num_images
        covariance = (scatter - left_out.T @ left_out - num_images * shift.outer(shift)) / (num_images - 1)
        scores.append(frechet_distance(Moments(mean + shift, covariance, num_images), reference))
    margin = STUDENT_T_95 * float(np.std(scores)) * (len(scores) - 1) ** 0.5
    score = frechet_distance(moments(features), reference)
    return score - margin, score + margin


def inception_score(logits: Tensor, seed: int) -> tuple[float, float]:
    """Mean and deviation over 10 splits of exp(E[KL(p(y|x) || p(y))]) (Salimans et al. 2016, arXiv 1606.03498).

    Logits [n, k]; with n < 10 as many splits as images.
    """
    result = isc_features_to_metric(logits, splits=min(10, len(logits)), shuffle=True, rng_seed=seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def kernel_distance(fake: Tensor, real: Tensor, seed: int) -> tuple[float, float]:
    """KID: mean and deviation over 100 subsets of at most 1,000 images of the unbiased squared MMD with the kernel
    (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    Features [m, d] and [n, d]. In float32 as torch-fidelity has it: on the `mnist` features that moves the mean by
    1e-6 at a deviation of 0.5, and takes two thirds of float64's time.
    """
    size = min(KID_SUBSET_SIZE, len(fake), len(real))
    settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    result = kid_features_to_metric(fake, real, **settings)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def manifold_scores(fake: Tensor, real: Tensor, poll: Poll = lambda: None) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020,
    arXiv 2002.09797), with balls that reach to the 5th nearest neighbour.

    precision: share of fakes inside some real ball; density: mean number of real balls around a fake, divided by 5;
    recall: share of reals inside some fake ball; coverage: share of real balls that hold a fake.
    Fake [m, d], real [n, d], m and n > 5. All four depend on m and n. torch-fidelity has the first two; all four share
    one pass over the distances here, which is half of its work.
    """
    fake, real = fake.double(), real.double()
    fake_radii, real_radii = _squared_radii(fake, poll), _squared_radii(real, poll)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    num_precise = num_balls = 0
    for rows, distances in _squared_distances(fake, real, poll):
        recalled |= (distances <= fake_radii[rows, None]).any(0)
        inside = distances <= real_radii
        covered |= inside.any(0)
        balls = inside.count_nonzero(1)
        num_precise += int(balls.count_nonzero())
        num_balls += int(balls.sum())
    return {
        "precision": num_precise / len(fake),
        "recall": recalled.double().mean().item(),
        "density": num_balls / (NEIGHBOURS * len(fake)),
        "coverage": covered.double().mean().item(),
    }


def nearest_neighbours(features: Tensor, training: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest rows of `training` [n, d] to each row of `features` [m, d], nearest first.

    Returns indices int64 [m, count] and Euclidean distances float64 [m, count].
    """
    blocks = _squared_distances(features.double(), training.double())
    nearest = [distances.topk(count, largest=False) for _, distances in blocks]
    return torch.cat([part.indices for part in nearest]), torch.cat([part.values for part in nearest]).sqrt()


def class_shares(classes: Tensor, num_classes: int) -> Tensor:
    """Share of each class among int64 [n]: float64 [num_classes], sums to 1."""
    return classes.bincount(minlength=num_classes).double() / len(classes)


def total_variation(ours: Tensor, theirs: Tensor) -> float:
    """Half the L1 distance of two distributions over the same classes: 0 equal, 1 disjoint."""
    return (ours - theirs).abs().sum().item() / 2


def class_frechet_distances(
    fake: Tensor, fake_classes: Tensor, real: Tensor, real_classes: Tensor, num_classes: int
) -> list[float | None]:
    """FID within each class; None where either side has too few images for a covariance of full rank.

    Features [n, d] and classes int64 [n] of both sides.
    """
    scores: list[float | None] = []
    for index in range(num_classes):
        ours, theirs = fake[fake_classes == index], real[real_classes == index]
        enough = min(len(ours), len(theirs)) > fake.shape[1]
        scores.append(frechet_distance(moments(ours), moments(theirs)) if enough else None)
    return scores


def _squared_distances(ours: Tensor, theirs: Tensor, poll: Poll = lambda: None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the matrix |a - b|^2 between float64 [m, d] and [n, d]."""
    their_norms = theirs.square().sum(1)
    for start in range(0, len(ours), ROWS):
        poll()
        rows = slice(start, start + ROWS)
        norms = ours[rows].square().sum(1, keepdim=True)
        yield rows, torch.addmm(their_norms, ours[rows], theirs.T, alpha=-2).add_(norms).clamp_(min=0)


def _squared_radii(features: Tensor, poll: Poll) -> Tensor:
    """Squared distance of each row of [n, d] to its 5th nearest other row."""
    # topk takes a ninth of kthvalue's time here. The nearest row is the row itself.
    return torch.cat(
        [d.topk(NEIGHBOURS + 1, largest=False).values[:, -1] for _, d in _squared_distances(features, features, poll)]
    )
