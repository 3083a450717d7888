"""Scores of samples of features or logits. One more is a function and a line of the table SAMPLE_SCORES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torchmetrics.image.kid import maximum_mean_discrepancy

from pipeline.evaluation.interruption import check_interrupted
from pipeline.evaluation.metrics.frechet import NORMAL_95, Moments, frechet_distance
from pipeline.evaluation.metrics.neighbours import NEIGHBOURS, manifold_scores, nearest_neighbours
from pipeline.evaluation.metrics.states import Sample, Tensors
from pipeline.rng import seeded

KEEP = 50_000  # most images of a side in a sample
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
PROJECTIONS = 128
IMAGES_PER_MODE = 10  # at least, for an interval around a divergence of modes
AT_ONCE = 16  # projections sorted together: 1.3 MB of either side with 10,000 images


def inception_score(logits: Tensor, seed: int) -> tuple[float, float]:
    """Returns mean and deviation over 10 splits (or n, if n < 10) of exp(E[KL(p(y|x) || p(y))]), of logits [n, k]
    (Salimans et al. 2016, arXiv 1606.03498).
    """
    result = isc_features_to_metric(logits, splits=min(10, len(logits)), shuffle=True, rng_seed=seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def kernel_distance(fake: Tensor, real: Tensor, seed: int) -> tuple[float, float]:
    """Returns KID: mean and deviation over 100 subsets of at most 1,000 images of the unbiased squared MMD with the
    kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401), of features [m, d] and [n, d], m and n >= 2.

    torchmetrics' estimator on torch-fidelity's subsets, in float32 as both have it: on the `mnist` features float64
    would move the mean by 1e-6, at a deviation of 0.5, and take half as long again.
    """
    size, random = min(KID_SUBSET_SIZE, len(fake), len(real)), np.random.RandomState(seed)
    one, kernels = fake.new_ones(1), fake.new_empty(3, size, size)  # fresh memory would cost as much as the products
    distances = []
    for _ in range(KID_SUBSETS):
        check_interrupted()
        ours, theirs = (rows[torch.from_numpy(random.choice(len(rows), size, replace=False))] for rows in (fake, real))
        for kernel, x, y in zip(kernels, (theirs, theirs, ours), (theirs, ours, ours), strict=True):
            torch.addmm(one, x, y.T, alpha=1 / x.shape[1], out=kernel).pow_(3)
        distances.append(maximum_mean_discrepancy(*kernels).item())
    return float(np.mean(distances)), float(np.std(distances))


def sliced_wasserstein(fake: Tensor, real: Tensor, seed: int) -> float:
    """Returns the root of the mean, over 128 random directions u, of W2(u.x, u.y)^2, of features [n, d] of either side,
    in float64 (Bonneel et al. 2015, Sliced and Radon Wasserstein Barycenters of Measures; for GANs Deshpande et al.
    2018, arXiv 1803.11188).

    On a line the optimal transport of n points to n points joins the i-th smallest of both, so W2^2 is the mean squared
    difference of the sorted projections. Unlike FID it sees more than means and covariances.
    """
    directions = torch.randn(fake.shape[1], PROJECTIONS, generator=seeded(seed, "projections"), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(fake.device)
    sides, squares = [rows.double().T.contiguous() for rows in (fake, real)], []
    for some in directions.split(AT_ONCE, dim=1):
        check_interrupted()
        ours, theirs = ((some.T @ rows).sort(dim=1).values for rows in sides)
        squares.append((ours - theirs).square().mean(1))
    return torch.cat(squares).mean().sqrt().item()


def authenticity(features: Tensor, training: Tensor) -> float:
    """Returns the share of images that are further from their nearest training image than that one is from the training
    image nearest to it, of features [m, d] and [n, d], n >= 2 (Alaa et al. 2022, arXiv 2102.08921).

    It is 0 for copies of training images and 1 far from all of them. If good images have far less than unseen real
    ones, the generator copies; images of an untrained one may have little as well, where training images are far apart.
    C_T (Meehan et al. 2020, arXiv 2004.05675) grows with the number of images and needs many in each cell.
    """
    nearest, distances = nearest_neighbours(features, training, 1)
    chosen, places = torch.unique(nearest[:, 0], return_inverse=True)
    _, among_training = nearest_neighbours(training[chosen], training, 2)  # the nearest is the image itself
    return (distances[:, 0] > among_training[places, 1]).double().mean().item()


class Options(NamedTuple):
    """What scores of samples depend on besides the samples."""

    seed: int = 0  # of subsets, splits and projections
    neighbours: int = NEIGHBOURS  # the k of precision, recall, density and coverage
    real_radii: Callable[[Tensor], Tensor] | None = None  # returns the `squared_radii` of a real sample [n, d]


def _manifold(fake: Tensor, real: Tensor, options: Options) -> Sequence[float]:
    if len(fake) <= options.neighbours:  # there are as many real images
        return [torch.nan] * 4
    radii = options.real_radii and options.real_radii(real)
    return list(manifold_scores(fake, real, options.neighbours, radii).values())


@dataclass(frozen=True)
class SampleScore:
    """A score of a sample [m, d] of generated images and one [n, d] of real images."""

    names: tuple[str, ...]
    function: Callable[[Tensor, Tensor, Options], Sequence[float]]  # returns a number for each name
    most_fake: int = KEEP  # most generated images that it takes
    equal: bool = False  # whether it takes as many real images as generated ones, as it depends on both numbers
    against_training: bool = False  # whether the real images are the training split, whatever the reference is
    least: tuple[int, int] = (2, 2)  # fewest generated and real images that give a score
    rows: str = "features"  # what the samples hold: "features" or "logits"

    def __call__(
        self, fake: Sample, real: Sample, options: Options, most_fake: int | None = None
    ) -> tuple[dict[str, float], list[int]]:
        """Returns the scores by name, NaN for too few images, and the numbers of generated and of real images used. A
        score of logits takes no real images. `most_fake` is by default that of the score."""
        num_real = real.size if self.rows == "features" else 0
        count = min(fake.size, most_fake or self.most_fake, *([num_real] if self.equal else []))
        numbers = [count, count if self.equal else num_real]
        if any(number < least for number, least in zip(numbers, self.least, strict=True)):
            return dict.fromkeys(self.names, torch.nan), numbers
        scores = self.function(fake.first(numbers[0])[0], real.first(numbers[1])[0], options)
        return dict(zip(self.names, scores, strict=True)), numbers


SAMPLE_SCORES = {
    "inception_score": SampleScore(
        ("is_mean", "is_std"), lambda x, _, options: inception_score(x, options.seed), least=(1, 0), rows="logits"
    ),
    "kid": SampleScore(("kid_mean", "kid_std"), lambda x, y, options: kernel_distance(x, y, options.seed)),
    "manifold": SampleScore(("precision", "recall", "density", "coverage"), _manifold, 10_000, equal=True),
    "sliced_wasserstein": SampleScore(
        ("sliced_wasserstein",), lambda x, y, o: [sliced_wasserstein(x, y, o.seed)], 10_000, equal=True, least=(1, 1)
    ),
    "authenticity": SampleScore(
        ("authenticity",), lambda x, y, _: [authenticity(x, y)], 1_000, against_training=True, least=(1, 2)
    ),
}

ClassScore = float | Tensor | tuple[float, float]
"""A number, a number for each class, or an interval."""


def class_scores(fake: Tensors, real: Tensors) -> dict[str, ClassScore]:
    """Compares the classes of both sides, given as the tensors of `states.ClassSums`. The same classifier assigns both,
    so that its mistakes do not count against the images. NaN where a side has no images.

    Returns "class_histogram" and "class_histogram_real", shares [num_classes]; "class_total_variation", half the L1
    distance of the two; "confidence_mean", the mean probability of the generated images' likeliest class;
    "class_accuracy", how often that is the class that they should show, or GAN-test (Shmelkov et al. 2018, arXiv
    1807.09499); "fid_per_class" [num_classes], NaN for a class that has on either side too few images for a covariance
    of full rank; and `mode_scores`.
    """
    shares, real_shares = (side["count"].double() / side["count"].sum() for side in (fake, real))
    return {
        "class_histogram": shares,
        "class_histogram_real": real_shares,
        "class_total_variation": (shares - real_shares).abs().sum() / 2,
        "confidence_mean": fake["confidence"] / fake["count"].sum(),
        "class_accuracy": fake["recognised"] / fake["labelled"],
        "fid_per_class": fid_per_class(fake, real),
        **mode_scores(fake["count"]),
    }


def class_floors(floor: Tensors, real: Tensors, num_images: int, seed: int) -> dict[str, ClassScore]:
    """Returns the "fid_per_class_floor" of all images of another real split in the place of the generated ones, and the
    `mode_scores` of at most `num_images` of them, drawn without replacement, as "modes_floor" and "mode_kl_floor"."""
    classes = torch.arange(len(floor["count"])).repeat_interleave(floor["count"])
    drawn = classes[torch.randperm(len(classes), generator=seeded(seed, "modes of real images"))[:num_images]]
    modes, divergence, _ = mode_scores(drawn.bincount(minlength=len(floor["count"]))).values()
    return {"fid_per_class_floor": fid_per_class(floor, real), "modes_floor": modes, "mode_kl_floor": divergence}


def mode_scores(counts: Tensor) -> dict[str, Any]:
    """Compares the classes of generated images with the uniform distribution over all K classes, of the numbers of
    images in each, int64 [K].

    Returns "modes", how many classes have an image, and "mode_kl", the KL divergence sum_k p_k log(K p_k) of their
    shares p from the uniform distribution, as Stacked MNIST is scored with 26,000 images (Srivastava et al. 2017, arXiv
    1705.07761; Lin et al. 2018, 1712.04086; Huang et al. 2024, 2501.05441). N draws of K equally likely classes have
    (K - 1) / (2 N) in the mean, 0.019 there (Miller 1955, Note on the bias of information estimates).

    "mode_kl_interval" is a 95 % interval for the mean divergence of as many images of this generator, with that bias in
    both ends; NaN for fewer than IMAGES_PER_MODE images a mode. The divergence's variance is that of log p_k over the
    images, divided by N, and (M - 1) / (2 N^2) of pairs of images, for M modes. The former comes out too large by
    (M - 1) / N^2, as p is of the same images, which is subtracted. In simulations (10 and 1,000 classes, uniform to
    Zipf's law) it held the mean 83 to 100 times in 100 (least with 10 to 20 images a class), with 26 94 to 95.
    """
    present, count = counts[counts > 0].double(), int(counts.sum())
    if not count:
        return {"modes": torch.nan, "mode_kl": torch.nan, "mode_kl_interval": (torch.nan, torch.nan)}
    shares, num_modes = present / count, len(present)
    information = (shares * len(counts)).log()
    divergence = (shares * information).sum().item()
    of_images = (shares * (information - divergence).square()).sum().item() / count
    of_pairs = (num_modes - 1) / count**2
    margin = NORMAL_95 * (max(of_images - of_pairs, 0) + of_pairs / 2) ** 0.5
    margin = margin if count >= IMAGES_PER_MODE * num_modes else torch.nan
    interval = divergence - margin, divergence + margin
    return {"modes": num_modes, "mode_kl": divergence, "mode_kl_interval": interval}


def fid_per_class(fake: Tensors, real: Tensors) -> Tensor:
    """Returns the FID within each class, [num_classes] float64: see `class_scores`."""
    distances = torch.full((len(fake["count"]),), torch.nan, dtype=torch.float64)
    for index in range(min(len(side["sum"]) for side in (fake, real))):
        check_interrupted()
        sides = [{name: side[name][index] for name in ("count", "sum", "products")} for side in (fake, real)]
        if all(side["count"] > len(side["sum"]) for side in sides):
            distances[index] = frechet_distance(*map(Moments.of_sums, sides))
    return distances
