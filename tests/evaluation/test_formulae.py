"""The formulae, against values worked out by hand and plain float64 references."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline.errors import UserError
from pipeline.evaluation.metrics import ClassScores, ManifoldScores, frechet, neighbours
from pipeline.evaluation.metrics.frechet import (
    Moments,
    frechet_distance,
    frechet_extrapolated,
    frechet_interval,
    frechet_variance,
)
from pipeline.evaluation.metrics.neighbours import manifold_scores, nearest_neighbours
from pipeline.evaluation.metrics.scores import (
    PROJECTIONS,
    SAMPLE_SCORES,
    Options,
    authenticity,
    class_floors,
    inception_score,
    kernel_distance,
    mode_scores,
    sliced_wasserstein,
)
from pipeline.evaluation.metrics.states import Batch, Sample
from pipeline.rng import seeded


def normal(num_rows: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) + shift


def interval(sample: Tensor, reference: Moments, seed: int) -> tuple[float, float] | None:
    score = frechet_distance(Moments.of_features(sample), reference)
    return frechet_interval(sample, len(sample), score, reference, seed)


def test_moments_by_hand() -> None:
    found = Moments.of_features(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert found.mean.tolist() == [1.0, 2.0]
    assert found.covariance.tolist() == [[2.0, 4.0], [4.0, 8.0]]
    assert found.num_images == 2
    assert found.mean.dtype == found.covariance.dtype == torch.float64


def test_frechet_distance_by_hand() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum of (sqrt a - sqrt b)^2 = 25 + (1 - 3)^2 + (2 - 5)^2."""
    ours = Moments(torch.tensor([0.0, 3.0]).double(), torch.tensor([1.0, 4.0]).double().diag(), 10)
    theirs = Moments(torch.tensor([4.0, 0.0]).double(), torch.tensor([9.0, 25.0]).double().diag(), 10)
    assert frechet_distance(ours, theirs) == pytest.approx(38.0, rel=1e-12)
    assert frechet_distance(ours, ours) == pytest.approx(0.0, abs=1e-12)


def test_published_moments_are_read_or_refused_by_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "published.npz"
    mean, covariance = np.array([0.0, 3.0], np.float32), np.diag([1.0, 4.0])
    np.savez(path, mu=mean, sigma=covariance)
    found = Moments.of_file(path, 2)
    assert (found.mean.tolist(), found.covariance.tolist()) == ([0.0, 3.0], [[1.0, 0.0], [0.0, 4.0]])
    theirs = Moments(torch.tensor([4.0, 0.0]).double(), torch.tensor([9.0, 25.0]).double().diag(), 10)
    assert frechet_distance(theirs, found) == pytest.approx(38.0, rel=1e-12)
    for arrays, words in (
        ({"mu": mean}, "'sigma"),
        ({"mu": mean, "sigma": covariance[:1]}, r"mu is \(2,\) and sigma \(1, 2\), of 2 features"),
        ({"mu": mean, "sigma": covariance + np.array([[0, 1], [0, 0]])}, "sigma is not symmetric"),
        ({"mu": mean * np.nan, "sigma": covariance}, "a number is not finite"),
        ({"mu": np.array([None, None]), "sigma": covariance}, "allow_pickle=False"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(
            UserError, match=f"evaluation.reference_statistics .*published.npz cannot be used: .*{words}"
        ):
            Moments.of_file(path, 2)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"give an \.npz file with mu"):
        Moments.of_file(path, 2)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_is_symmetric_and_survives_rotation(seed: int) -> None:
    first, second = normal(50, 6, seed).double(), normal(70, 6, seed + 10, 0.5).double() * 2
    rotation = torch.linalg.qr(normal(6, 6, seed + 20).double()).Q
    distance = frechet_distance(Moments.of_features(first), Moments.of_features(second))
    assert frechet_distance(Moments.of_features(second), Moments.of_features(first)) == pytest.approx(
        distance, rel=1e-9
    )
    turned = frechet_distance(Moments.of_features(first @ rotation), Moments.of_features(second @ rotation))
    assert turned == pytest.approx(distance, rel=1e-9)


COVERED = {"null": (0, 1), "near": (0.1, 1), "wider": (0, 1.1), "narrower": (0, 0.8), "far": (50, 1)}
"""Squared distance of the means, and variance, of N(mean, variance I) against N(0, I)."""


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERED)
def test_frechet_interval_covers_the_mean_score(case: str) -> None:
    """Over repeated samples the interval holds their mean FID 95 times in 100, give or take what 400 samples leave. The
    jackknife alone holds it 99 times at the null, and a resampling with replacement would sit too high there, where FID
    is nothing but bias. 500 images of 32 features have the share of 2,000 of 128."""
    distance, variance = COVERED[case]
    reference = Moments(torch.zeros(32).double(), torch.eye(32).double(), 10**6)
    scores, intervals = [], []
    for seed in range(400):
        sample = normal(500, 32, seed) * variance**0.5 + (distance / 32) ** 0.5
        scores.append(frechet_distance(Moments.of_features(sample), reference))
        intervals.append(frechet_interval(sample, 500, scores[-1], reference, seed) or (math.nan, math.nan))
    covered = np.mean([low <= np.mean(scores) <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.98


def test_frechet_interval_holds_the_score_and_needs_images() -> None:
    sample, reference = normal(200, 3, 0, 0.2), Moments.of_features(normal(1000, 3, 1))
    low, high = interval(sample, reference, seed=0) or (math.nan, math.nan)
    score = frechet_distance(Moments.of_features(sample), reference)
    assert low < score < high
    assert (low + high) / 2 == pytest.approx(score, rel=1e-9)
    assert interval(sample, reference, seed=0) == (low, high)
    assert interval(sample[:39], reference, seed=0) is None


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_the_extrapolated_distance_has_no_bias_of_the_number_of_images(shift: float) -> None:
    """Against N(0, I) itself the FID of N(shift, I) is |shift|^2; that of 400 images is 0.07 above it in the mean, that
    of 100 images 0.28."""
    reference, truth = Moments(torch.zeros(8).double(), torch.eye(8).double(), 10**9), 8 * shift**2
    plain, extrapolated = [], []
    for seed in range(40):
        sample = normal(400, 8, seed, shift)
        plain.append(frechet_distance(Moments.of_features(sample), reference))
        extrapolated.append(frechet_extrapolated(sample, 400, plain[-1], reference, seed) or math.nan)
    assert np.mean(plain) - truth > 0.06
    assert abs(np.mean(extrapolated) - truth) < 0.015  # three standard errors of the mean
    assert np.std(extrapolated) < 1.5 * np.std(plain) + 0.01


def test_the_extrapolated_distance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FIDs that are 7 + 90 / N the line gives 7, also where the images at hand are some of a larger number."""
    reference = Moments.of_features(normal(100, 3, 1))
    monkeypatch.setattr(frechet, "frechet_distance", lambda ours, theirs: 7 + 90 / ours.num_images)
    for count in (120, 1000):
        found = frechet_extrapolated(normal(120, 3, 0), count, 7 + 90 / count, reference, seed=0)
        assert found == pytest.approx(7, rel=1e-9)


def test_the_extrapolated_distance_needs_four_images_a_feature_in_each_part() -> None:
    """With one it is far below the truth: here 1.8 in the place of 2.4, in the mean."""
    reference, truth = Moments(torch.zeros(32).double(), torch.eye(32).double(), 10**9), 2.4
    found = []
    for seed in range(20):
        sample = normal(512, 32, seed, (truth / 32) ** 0.5)
        for count in (511, 512):
            score = frechet_distance(Moments.of_features(sample[:count]), reference)
            found.append(frechet_extrapolated(sample[:count], count, score, reference, seed))
    assert found[::2] == [None] * 20
    assert np.mean([value or math.nan for value in found[1::2]]) == pytest.approx(truth, abs=0.15)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_variance_is_that_of_a_jackknife_without_what_pairs_do(shift: float) -> None:
    """Which computes each FID from its images (Efron & Stein 1981): of all but one the variance, of all but two the
    second differences Q, here of the pairs that stand side by side in the same random order."""
    count, sample, reference = 200, normal(200, 3, 0, shift), Moments.of_features(normal(1000, 3, 1))
    rows = sample[torch.randperm(count, generator=seeded(5, "pairs of images"))]

    def without(*left_out: int) -> float:
        keep = torch.ones(count, dtype=torch.bool)
        keep[list(left_out)] = False
        return frechet_distance(Moments.of_features(rows[keep]), reference)

    ones = np.array([without(index) for index in range(count)])
    twos = np.array([without(index, index - 1) for index in range(count)])
    second = count * without() - (count - 1) * (ones + np.roll(ones, 1)) + (count - 2) * twos
    expected = (count - 1) ** 2 * ones.var(ddof=1) / count - np.square(second).mean() / 2
    assert np.square(second).mean() / 2 > (0.3 if shift == 0 else 0.01) * expected
    assert frechet_variance(sample, count, reference, seed=5) == pytest.approx(expected, rel=0.05)


def test_the_variance_falls_with_the_number_of_images() -> None:
    """Of N images of which 500 are at hand: far from the reference as 1 / N, at the null as 1 / N^2."""
    reference = Moments(torch.zeros(8).double(), torch.eye(8).double(), 10**6)
    for shift, power in ((2.0, 1), (0.0, 2)):
        sample = normal(500, 8, 1, shift)
        few, many = (frechet_variance(sample, count, reference, seed=0) for count in (500, 5000))
        assert few / many == pytest.approx(10**power, rel=0.1 if power == 1 else 0.5)


def test_the_variance_of_few_images_is_a_jackknifes() -> None:
    """With fewer than two images a feature it errs on the wide side."""
    reference = Moments(torch.zeros(32).double(), torch.eye(32).double(), 10**6)
    for count in (40, 60):
        samples = [normal(count, 32, seed) for seed in range(100)]
        deviation = np.std([frechet_distance(Moments.of_features(sample), reference) for sample in samples])
        widths = [frechet_variance(sample, count, reference, seed=0) ** 0.5 for sample in samples]
        assert deviation < np.mean(widths) < 1.6 * deviation


def test_inception_score_by_hand() -> None:
    """Sure of each of k classes equally often: k. No idea about any image: 1."""
    sure = 100 * torch.eye(4).repeat(100, 1)
    mean, _ = inception_score(sure, seed=0)
    assert 3.8 < mean <= 4.0  # a split's classes are only about equally frequent
    assert inception_score(sure[:4], seed=0)[0] == pytest.approx(1.0)  # one image a split
    assert inception_score(torch.zeros(100, 4), seed=0) == pytest.approx((1.0, 0.0))


def test_kernel_distance_against_a_plain_reference() -> None:
    """One subset's worth of images, so that every subset is the whole: the unbiased estimator, pair by pair."""
    fake, real = normal(40, 8, 0, 0.5), normal(40, 8, 1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / 8 + 1) ** 3

    def others(matrix: Tensor) -> float:
        return (matrix.sum() - matrix.trace()).item() / (40 * 39)

    plain = others(kernel(fake, fake)) + others(kernel(real, real)) - 2 * kernel(fake, real).mean().item()
    mean, deviation = kernel_distance(fake, real, seed=7)
    assert mean == pytest.approx(plain, rel=1e-5)
    assert deviation < 1e-5
    assert kernel_distance(real, real, seed=7)[0] < mean / 10


def test_kernel_distance_depends_on_the_seed_alone() -> None:
    fake, real = normal(1200, 8, 0, 0.2), normal(1300, 8, 1)
    first = kernel_distance(fake, real, seed=7)
    assert kernel_distance(fake, real, seed=7) == first
    assert kernel_distance(fake, real, seed=8) != first


def test_kernel_distance_by_hand() -> None:
    """Every subset is the whole here. x = 0, 1; y = 2, 3 (d = 1): k(0, 1) = 1, k(2, 3) = 7^3, cross 1, 1, 3^3, 4^3."""
    mean, deviation = kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]), seed=0)
    assert mean == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)
    assert deviation == pytest.approx(0.0, abs=1e-4)


def plain_manifold(fake: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """All pairs by broadcasting in float64, no shortcut."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return (a.double()[:, None] - b.double()[None]).square().sum(2).sqrt()

    cross = distances(fake, real)
    fake_radii = distances(fake, fake).sort(1).values[:, k]
    real_radii = distances(real, real).sort(1).values[:, k]
    inside = cross <= real_radii
    return {
        "precision": inside.any(1).double().mean().item(),
        "recall": (cross <= fake_radii[:, None]).any(0).double().mean().item(),
        "density": inside.double().sum().item() / k / len(fake),
        "coverage": inside.any(0).double().mean().item(),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_manifold_scores_against_the_plain_reference(seed: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 64)  # several blocks, the last one short
    fake, real = normal(300, 5, seed, shift), normal(410, 5, seed + 100)
    found = manifold_scores(fake, real)
    assert found == pytest.approx(plain_manifold(fake, real), rel=1e-12)
    theirs = prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=5, verbose=False)
    assert found["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert found["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0 < found["recall"] < 1 or shift == 0


@pytest.mark.parametrize("seed", range(2))
def test_pairs_that_float32_cannot_decide_are_decided_exactly(seed: int) -> None:
    """So far from the origin that some pairs are nearer to a ball's surface than float32 products round."""
    fake, real = normal(1500, 8, seed, 3.0), normal(1500, 8, seed + 10, 3.0)
    assert manifold_scores(fake, real) == pytest.approx(plain_manifold(fake, real), rel=1e-12)


def test_manifold_scores_by_hand() -> None:
    """Reals 0..6 on a line, fakes 0..5 with one far away: real balls reach 5 neighbours."""
    real = torch.arange(7.0)[:, None]
    fake = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 100.0])[:, None]
    # Radii of the reals: 5 4 3 3 3 4 5. Balls that hold 0..4: 0-5, 0-5 (1 +- 4), 0-5, 0-6, 1-6 (4 +- 3), 1-6, 1-6.
    found = manifold_scores(fake, real)
    assert found["precision"] == pytest.approx(5 / 6)
    assert found["coverage"] == 1.0
    assert found["recall"] == 1.0  # the far fake's neighbour number 5 is at 0: its ball holds every real
    assert found["density"] == pytest.approx((4 + 7 + 7 + 7 + 7) / 5 / 6)


def test_nearest_neighbours_by_hand_and_against_brute_force() -> None:
    training = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    indices, distances = nearest_neighbours(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), training, 2)
    assert indices.tolist() == [[0, 1], [2, 1]]
    assert distances.flatten().tolist() == pytest.approx([0.0, 5.0, 1.0, math.sqrt(36 + 16)])
    features, many = normal(30, 4, 0), normal(500, 4, 1)
    indices, distances = nearest_neighbours(features, many, 3)
    brute = (features.double()[:, None] - many.double()).norm(dim=2).sort(1)
    assert torch.equal(indices, brute.indices[:, :3])
    torch.testing.assert_close(distances, brute.values[:, :3], rtol=1e-9, atol=1e-12)


def test_sliced_wasserstein_by_hand() -> None:
    """On a line every projection is the line: 0, 1, 5 and 2, 7, 3 are joined in order, so (4 + 4 + 4) / 3. In the plane
    a shift by (3, 4) is one of 3 u1 + 4 u2 along u."""
    fake, real = torch.tensor([[1.0], [5.0], [0.0]]), torch.tensor([[2.0], [3.0], [7.0]])
    assert sliced_wasserstein(fake, real, seed=0) == pytest.approx(2.0)
    rows = normal(50, 2, 0).double()
    directions = torch.randn(2, PROJECTIONS, generator=seeded(5, "projections"), dtype=torch.float64)
    along = torch.tensor([3.0, 4.0]).double() @ (directions / directions.norm(dim=0))
    shifted = sliced_wasserstein(rows + torch.tensor([3.0, 4.0]), rows, seed=5)
    assert shifted == pytest.approx(along.square().mean().sqrt().item(), rel=1e-9)
    assert shifted == pytest.approx(math.sqrt(25 / 2), rel=0.2)  # the mean over all directions
    assert sliced_wasserstein(rows.flip(0), rows, seed=5) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_sees_what_moments_do_not() -> None:
    """Two modes against a normal distribution of the same mean and covariance: FID is nothing but its bias."""
    random = torch.Generator().manual_seed(0)
    modes = torch.randint(2, (2000, 3), generator=random) * 2.0 - 1
    other, same = normal(2000, 3, 1), normal(2000, 3, 2)
    assert frechet_distance(Moments.of_features(modes), Moments.of_features(other)) < 0.02
    assert sliced_wasserstein(modes, other, 0) > 3 * sliced_wasserstein(same, other, 0)


def sample_of(rows: Tensor) -> Sample:
    sample = Sample(rows.shape[1], 50_000)
    sample.add(Batch(rows))
    return sample


def test_sliced_wasserstein_takes_as_many_of_either_side() -> None:
    fake, real = sample_of(normal(50, 3, 0)), sample_of(normal(80, 3, 1))
    scores, used = SAMPLE_SCORES["sliced_wasserstein"](fake, real, Options())
    assert used == [50, 50]
    assert scores["sliced_wasserstein"] == sliced_wasserstein(normal(50, 3, 0), real.first(50)[0], 0)


def test_authenticity_by_hand() -> None:
    """Training images 0, 1, 10, 14 have their nearest other one at 1, 1, 4, 4. Generated: 0 is a copy (0 < 1), 3 is
    2 from 1 (2 > 1), 12 is 2 from either (2 < 4), 20 is 6 from 14 (6 > 4)."""
    training = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    assert authenticity(torch.tensor([[0.0], [3.0], [12.0], [20.0]]), training) == 0.5
    assert authenticity(training, training) == 0
    stray = torch.cat([training, torch.tensor([[100.0]])])
    assert authenticity(torch.full((9, 1), 101.0), stray) == 0, "also beside a training image that is alone"
    assert authenticity(torch.tensor([[0.0]]), torch.tensor([[0.0], [0.0]])) == 0, "a copy of a twin is a copy"


@pytest.mark.parametrize("seed", range(3))
def test_authenticity_falls_with_copies_and_tells_nothing_of_strangers(seed: int) -> None:
    training, fresh = normal(3000, 4, seed), normal(1000, 4, seed + 10)
    copies = training[:1000] + 0.01 * normal(1000, 4, seed + 20)

    def share(generated: Tensor) -> float:
        return authenticity(generated, training)

    assert 0.4 < share(fresh) < 0.7
    assert share(copies) < 0.05
    assert share(torch.cat([copies[:500], fresh[:500]])) == pytest.approx((share(copies) + share(fresh)) / 2, abs=0.05)
    assert share(fresh + 20) > 0.95


def test_authenticity_takes_some_images_among_all_training_images() -> None:
    fake, real = sample_of(normal(1_100, 3, 0)), sample_of(normal(80, 3, 1))
    scores, used = SAMPLE_SCORES["authenticity"](fake, real, Options())
    assert used == [1_000, 80]
    assert scores["authenticity"] == authenticity(fake.first(1_000)[0], normal(80, 3, 1))


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_manifold_scores_for_other_neighbours(neighbours: int) -> None:
    fake, real = normal(200, 4, 0, 0.5), normal(200, 4, 1)
    metric = ManifoldScores(4, neighbours=neighbours)
    metric.update(fake, real=False)
    metric.update(real, real=True)
    found = {name: score.item() for name, score in metric.compute().items()}
    assert found == pytest.approx(plain_manifold(fake, real, neighbours), rel=1e-12)


def test_class_scores_by_hand() -> None:
    """Fakes of classes 0 0 2 2 against one real of each of four: shares, distance, accuracy and confidence."""
    metric, features = ClassScores(2, 4), torch.zeros(4, 2)
    sure = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    metric.update(features, logits=torch.eye(4) * 100, real=True)
    metric.update(features, logits=sure[torch.tensor([[0, 1, 2, 3]] * 2 + [[1, 2, 0, 3]] * 2)], real=False)
    found = metric.compute()
    assert found["class_histogram"].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert found["class_histogram_real"].tolist() == [0.25] * 4
    assert found["class_total_variation"].item() == pytest.approx(0.5)
    assert found["confidence_mean"].item() == pytest.approx(0.5)
    assert math.isnan(found["class_accuracy"].item()), "no class was asked for"
    metric.update(features[:2], logits=sure.expand(2, -1), real=False, labels=torch.tensor([0, 3]))
    assert metric.compute()["class_accuracy"].item() == 0.5
    assert (found["modes"].item(), found["mode_kl"].item()) == (2, pytest.approx(math.log(2), rel=1e-12))
    assert found["mode_kl_interval"].shape == (2,)


def test_class_frechet_distances_need_a_full_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, real = normal(60, 4, 0), normal(60, 4, 1)
    fake_classes = torch.tensor([0] * 55 + [1] * 4 + [2])
    real_classes = torch.tensor([0] * 20 + [1] * 40)

    def distances() -> list[float]:
        metric = ClassScores(4, 3)
        for rows in torch.split(torch.arange(60), 7):
            metric.update(fake[rows], logits=torch.eye(3)[fake_classes[rows]], real=False)
            metric.update(real[rows], logits=torch.eye(3)[real_classes[rows]], real=True)
        found: list[float] = metric.compute()["fid_per_class"].tolist()
        return found

    expected = frechet_distance(Moments.of_features(fake[:55]), Moments.of_features(real[:20]))
    assert distances() == pytest.approx([expected, math.nan, math.nan], rel=1e-9, nan_ok=True)
    monkeypatch.setattr("pipeline.evaluation.metrics.states.MOST_SUMS", 3 * 4 * 4 - 1)
    assert all(map(math.isnan, distances()))


def test_mode_scores_by_hand() -> None:
    """The divergence of shares p from equal ones is sum p log(K p)."""
    for counts, modes, divergence in (
        ([5, 5, 5, 5], 4, 0.0),
        ([6, 0, 0, 0], 1, math.log(4)),
        ([3, 3, 0, 0], 2, math.log(2)),
        ([1, 0, 2, 1], 3, 0.25 * math.log(1) * 2 + 0.5 * math.log(2)),
    ):
        scores = mode_scores(torch.tensor(counts))
        assert scores["modes"] == modes
        assert scores["mode_kl"] == pytest.approx(divergence, rel=1e-12, abs=1e-12)
        assert all(map(math.isnan, scores["mode_kl_interval"]))
    # 10 images: log p has the variance 0.24 log(1.5)^2, less 1 / 10 but not below 0; pairs of images add 1 / 20.
    low, high = mode_scores(torch.tensor([12, 8]))["mode_kl_interval"]
    divergence, variance = 0.6 * math.log(1.2) + 0.4 * math.log(0.8), 0.24 * math.log(1.5) ** 2
    assert variance < 1 / 20
    assert (low + high) / 2 == pytest.approx(divergence, rel=1e-12)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(1 / 2) / 20, rel=1e-12)
    # 1,000 images: 0.16 log(4)^2 - 1 / 1,000, and 1 / 2,000 of pairs.
    low, high = mode_scores(torch.tensor([800, 200]))["mode_kl_interval"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt((0.16 * math.log(4) ** 2 - 0.0005) / 1000), rel=1e-12)


def zipf(num_classes: int) -> Tensor:
    return 1 / torch.arange(1, num_classes + 1)


@pytest.mark.parametrize(
    ("weights", "num_images", "bias"),
    [
        (torch.ones(1000), 26_000, 999 / 52_000),  # as Stacked MNIST is scored
        (torch.ones(10), 10_000, 9 / 20_000),
        (torch.cat([torch.ones(855), torch.zeros(145)]), 26_000, 854 / 52_000),
        (zipf(1000), 26_000, 999 / 52_000),
        (0.5 + torch.arange(1000) / 1000, 26_000, 999 / 52_000),
    ],
)
def test_the_divergence_of_modes_in_repeated_draws(weights: Tensor, num_images: int, bias: float) -> None:
    """Its mean is above that of the true shares by (K - 1) / (2 N), and the interval holds the mean 95 times in 100."""
    generator, shares = seeded(0, "draws"), weights.double() / weights.sum()
    truth = torch.special.xlogy(shares, shares * len(shares)).sum().item()
    draws = torch.multinomial(shares, num_images * 256, replacement=True, generator=generator).view(256, -1)
    scores = [mode_scores(draw.bincount(minlength=len(shares))) for draw in draws]
    divergences = np.array([score["mode_kl"] for score in scores])
    low, high = np.array([score["mode_kl_interval"] for score in scores]).T
    error = divergences.std() / 16
    assert divergences.mean() - truth == pytest.approx(bias, abs=4 * error + 0.05 * bias)
    assert np.mean((low < divergences.mean()) & (divergences.mean() < high)) > 0.91
    width = np.mean(high - low) / (2 * 1.96)
    assert width == pytest.approx(divergences.std(), rel=0.25)


def test_the_floor_of_modes_is_of_as_many_real_images() -> None:
    """Drawn from the counts without replacement, so that all of them are the split itself."""
    real = {"count": torch.tensor([30, 0, 10, 60]), "sum": torch.zeros(0, 2)}
    every = mode_scores(real["count"])
    for count in (100, 1000):
        floors = class_floors(real, real, count, seed=0)
        assert (floors["modes_floor"], floors["mode_kl_floor"]) == (3, every["mode_kl"])
    few = [float(class_floors(real, real, 10, seed)["mode_kl_floor"]) for seed in range(200)]  # type: ignore[arg-type]
    assert few[0] == class_floors(real, real, 10, 0)["mode_kl_floor"]
    assert len(set(few)) > 3
    # Of draws with replacement about 2 / 20 more; without it nine tenths of that.
    assert np.mean(few) - every["mode_kl"] == pytest.approx(0.09, abs=0.03)


def test_no_score_touches_the_global_random_state() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    features = normal(100, 3, 0)
    inception_score(features, seed=1)
    kernel_distance(features, features, seed=1)
    interval(features, Moments.of_features(features), seed=1)
    frechet_extrapolated(features, 100, 1.0, Moments.of_features(features), seed=1)
    sliced_wasserstein(features, features, seed=1)
    authenticity(features, features)
    manifold_scores(features, features)
    assert (torch.rand(1), np.random.rand()) == expected
