"""FID, KID and IS on the same images as `torch_fidelity.calculate_metrics`, with the same extractor."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics import MetricCollection

from pipeline import configure, evaluate
from pipeline.benchmarking.fidelity import fidelity_scores
from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.features.published import InceptionFeatures
from pipeline.evaluation.metrics import FrechetDistance, InceptionScore, KernelDistance
from pipeline.evaluation.metrics.scores import KID_SUBSET_SIZE

CPU = torch.device("cpu")
SEED = 5
NAMES = {
    "fid": "frechet_inception_distance",
    "kid_mean": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "is_mean": "inception_score_mean",
    "is_std": "inception_score_std",
}


def theirs(fake: Any, real: Any, subset: int, batch_size: int, **arguments: Any) -> dict[str, float]:
    settings = {"kid_subset_size": subset, "rng_seed": SEED, "batch_size": batch_size, "cache": False}
    found = fidelity_scores(fake, real, **settings, **arguments)
    return {ours: found[name] for ours, name in NAMES.items()}


def ours(
    fake: Tensor, real: Tensor, extractor: FeatureExtractor, names: Sequence[str] = ("fid", "kid", "is")
) -> dict[str, float]:
    width = extractor.num_features
    metrics: dict[str, Any] = {
        "fid": FrechetDistance(width),
        "kid": KernelDistance(width, seed=SEED),
        "is": InceptionScore(extractor.num_classes, seed=SEED),
    }
    collection = MetricCollection({name: metrics[name] for name in names})
    for images, is_real in ((fake, False), (real, True)):
        for batch in torch.split(images, 200):
            features, logits = extractor(batch)
            collection.update(features=features, logits=logits, real=is_real)
    return {name: score.item() for name, score in collection.compute().items()}


def compare(found: dict[str, float], expected: dict[str, float], kernel: float = 0.0) -> None:
    """KID is a difference of means of kernel values, which torch-fidelity computes in float32: where `kernel`, their
    size, is well above it, its digits are fewer, and which depends on the processor."""
    for name in found:
        tolerance = 1e-5 if name.startswith("is") else 1e-6
        rounding = 1e-6 * kernel if name.startswith("kid") else None
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=rounding), name


@pytest.mark.slow
@pytest.mark.parametrize("num_fake", [300, 1300])
def test_mnist_features(num_fake: int, mnist_dataset: Dataset, extractor: FeatureExtractor) -> None:
    """Digits with noise in them against digits; with 300, fewer images a class than features."""
    images, _ = load_split(mnist_dataset, "test")
    noise = torch.randint(0, 60, images[:num_fake].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fake, real = images[:num_fake] // 2 + noise, images[2000:4000]
    subset = min(KID_SUBSET_SIZE, num_fake)
    found = ours(fake, real, extractor)
    assert found["fid"] > 10
    compare(found, theirs(fake, real, subset, 100, feature_extractor="mnist"))


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file in torch-fidelity's format, random but with activations of a sensible size."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("any", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_features_of_two_folders(random_inception: Path, mnist_dataset: Dataset, tmp_path: Path) -> None:
    """By the metrics, by evaluating one folder against the other, and by torch-fidelity on the same files."""
    images, _ = load_split(mnist_dataset, "test")
    fake, real = images[:12] // 2, images[20:34]
    files: dict[str, list[str]] = {"fake": [], "real": []}
    for (name, paths), digits in zip(files.items(), (fake, real), strict=True):
        (tmp_path / name).mkdir()
        for number, digit in enumerate(digits):
            paths.append(str(tmp_path / name / f"{number:02d}.png"))
            Image.fromarray(digit[0].numpy()).save(paths[-1])
    extractor = InceptionFeatures(random_inception, CPU)
    found = ours(fake, real, extractor, ("kid", "is"))  # FID of 2,048 features takes seconds: once, below
    named = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(random_inception)}
    features = extractor(real)[0].double()
    kernel = (features @ features.T / features.shape[1] + 1).pow(3).mean().item()
    expected = theirs(ImagesPathDataset(files["fake"]), ImagesPathDataset(files["real"]), 12, 14, **named)
    compare(found, expected, kernel)
    np.savez(tmp_path / "published.npz", mu=features.mean(0).numpy(), sigma=features.T.cov().numpy())
    settings = {
        "evaluation.features": ["inception"],
        "evaluation.inception_weights": str(random_inception),
        "evaluation.reference_statistics": str(tmp_path / "published.npz"),
        "run.root": str(tmp_path / "runs"),
        "runtime.device": "cpu",
    }
    (result,) = evaluate(tmp_path / "fake", configure(None, settings), real=tmp_path / "real")
    scores: dict[str, Any] = result["features"]["inception"]
    assert [scores["fid"], scores["fid_published"]] == pytest.approx([expected["fid"]] * 2, rel=1e-6)
    digest = sha256((tmp_path / "published.npz").read_bytes()).hexdigest()
    published = {"path": str(tmp_path / "published.npz"), "sha256": digest}
    assert scores["provenance"]["reference_statistics"] == published
    assert (scores["fid_floor"], result["dataset"], result["num_images"]) == (None, str(tmp_path / "real"), 12)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["evaluations"]
    rgb = fake.expand(-1, 3, -1, -1)
    # Colour images go in as they are: channel order matters, a grey image equals its copy in three channels.
    coloured = images[:3].view(1, 3, 28, 28)
    features, logits = extractor(torch.cat([rgb[:1], coloured, coloured.flip(1)]))
    torch.testing.assert_close(features[0], extractor(fake[:1])[0][0], rtol=1e-4, atol=1e-4)
    assert logits.shape == (3, 1008)
    assert not torch.allclose(features[1], features[2], rtol=1e-3)
