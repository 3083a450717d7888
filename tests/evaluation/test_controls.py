"""Images whose faults are known move the scores the way theory says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FeatureExtractor

pytestmark = pytest.mark.slow
NUM_IMAGES = 2000
Score = Callable[[Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def test_digits(mnist_dataset: Dataset) -> tuple[Tensor, Tensor]:
    """In random order: the file's first half was written by other people than its second."""
    images, labels = load_split(mnist_dataset, "test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


@pytest.fixture(scope="module")
def score(mnist_dataset: Dataset, extractor: FeatureExtractor) -> Score:
    """Against the 60,000 training digits."""

    def run(images: Tensor) -> dict[str, Any]:
        return evaluate_images(ImageSet.of_tensor(images), mnist_dataset, [extractor])["mnist"]

    return run


@pytest.fixture(scope="module")
def real(score: Score, test_digits: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Scores of real digits, as many as each control has."""
    return score(test_digits[0][:NUM_IMAGES])


def test_the_test_split_scores_at_the_floor(score: Score, test_digits: tuple[Tensor, Tensor]) -> None:
    found = score(test_digits[0])
    assert found["fid"] == pytest.approx(found["fid_floor"], rel=1e-6)  # real features may be another job's
    assert 0.5 < found["fid_floor"] < 2
    assert found["fid_interval"][0] < found["fid_floor"] < found["fid_interval"][1]
    assert abs(found["kid_mean"]) < found["kid_std"]
    assert found["is_mean"] > 9.7
    assert found["class_total_variation"] < 0.02
    assert found["confidence_mean"] > 0.98
    for name in ("precision", "recall", "coverage"):
        assert found[name] > 0.9
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert all(score < 10 for score in found["fid_per_class"].values())
    assert found["fid_infinite"] < found["fid"]
    assert found["sliced_wasserstein"] == pytest.approx(found["sliced_wasserstein_floor"], rel=1e-6)
    assert found["authenticity"] == pytest.approx(found["authenticity_real"], abs=0.05)


def test_copies_of_training_images_are_not_authentic(
    score: Score, real: dict[str, Any], mnist_dataset: Dataset
) -> None:
    """But for those whose originals are not among the 50,000 of 60,000 that are kept. FID praises them."""
    found = score(load_split(mnist_dataset, "train")[0][:NUM_IMAGES])
    assert found["authenticity"] < found["authenticity_real"] / 2
    assert real["authenticity"] == pytest.approx(real["authenticity_real"], abs=0.06)
    assert found["fid"] < 1.2 * real["fid"]


def test_fid_of_infinitely_many_images_is_that_of_many(score: Score, test_digits: tuple[Tensor, Tensor]) -> None:
    """From 2,048 blurred digits, the fewest that have it, as from 10,000, whose FID is nearer to it."""
    blurred = gaussian_blur(test_digits[0], [5, 5], [0.5, 0.5])
    few, many = score(blurred[:2048]), score(blurred)
    assert few["fid_infinite"] < many["fid"] < few["fid"]
    assert abs(few["fid_infinite"] - many["fid_infinite"]) < abs(few["fid"] - many["fid_infinite"])


def test_uniform_noise_is_far_from_everything(score: Score, real: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    found = score(torch.randint(0, 256, (NUM_IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator))
    assert found["fid"] > 300 * real["fid"]
    assert found["kid_mean"] > 10 * found["kid_std"]
    assert found["sliced_wasserstein"] > 20 * found["sliced_wasserstein_floor"]
    assert found["authenticity"] > 0.99
    assert found["is_mean"] < 2
    assert found["precision"] < 0.01
    assert found["recall"] < 0.01
    assert found["coverage"] < 0.01


def test_one_repeated_image_is_precise_and_nothing_else(
    score: Score, real: dict[str, Any], test_digits: tuple[Tensor, Tensor]
) -> None:
    found = score(test_digits[0][:1].expand(NUM_IMAGES, -1, -1, -1))
    assert found["fid"] > 100 * real["fid"]
    assert found["is_mean"] == pytest.approx(1, abs=1e-6)
    assert found["precision"] == 1
    assert found["recall"] < 0.01
    assert found["coverage"] < 0.02
    assert found["class_total_variation"] > 0.85
    assert max(found["class_histogram"].values()) == 1


def test_a_missing_class_is_a_loss_of_recall_not_of_precision(
    score: Score, real: dict[str, Any], test_digits: tuple[Tensor, Tensor]
) -> None:
    images, labels = test_digits
    found = score(images[labels != 7][:NUM_IMAGES])
    assert found["fid"] > 5 * real["fid"]
    assert found["precision"] > real["precision"] - 0.03
    assert found["recall"] < real["recall"] - 0.05
    assert found["coverage"] < real["coverage"] - 0.05
    assert found["is_mean"] < real["is_mean"] - 0.5
    assert found["sliced_wasserstein"] > 1.5 * real["sliced_wasserstein"]
    assert found["class_histogram"]["7"] < 0.005
    assert found["class_total_variation"] == pytest.approx(found["class_histogram_real"]["7"], abs=0.03)
    assert found["fid_per_class"]["7"] is None
    assert found["fid_per_class"]["3"] is not None


def test_blur_loses_what_sets_digits_apart(
    score: Score, real: dict[str, Any], test_digits: tuple[Tensor, Tensor]
) -> None:
    """Strokes fade, so the features shrink towards the middle of the real ones: nothing strange, but no variety."""
    digits = test_digits[0][:NUM_IMAGES]
    light, heavy = (score(gaussian_blur(digits, [13, 13], [sigma, sigma])) for sigma in (1.0, 2.0))
    assert 20 * real["fid"] < light["fid"] < heavy["fid"] / 2
    assert 2 * real["sliced_wasserstein"] < light["sliced_wasserstein"] < heavy["sliced_wasserstein"]
    assert 20 * real["kid_mean"] < light["kid_mean"] < heavy["kid_mean"] / 1.2
    for name, margin in (("is_mean", 0.5), ("coverage", 0.1), ("confidence_mean", 0.02)):
        assert real[name] - margin > light[name] > heavy[name] + margin, name
    assert max(light["recall"], heavy["recall"]) < 0.1
    assert min(light["precision"], heavy["precision"]) > 0.9


def test_more_noise_scores_worse(score: Score, real: dict[str, Any], test_digits: tuple[Tensor, Tensor]) -> None:
    digits = test_digits[0][:NUM_IMAGES].float()
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(1))
    distances = [real["fid"]]
    for sigma in (16, 48, 96):
        distances.append(score((digits + sigma * noise).clamp(0, 255).to(torch.uint8))["fid"])
    assert all(later > 1.5 * earlier for earlier, later in pairwise(distances))
