"""FID, KID and IS on the same images as `torch_fidelity.calculate_metrics`, with the same extractor."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import calculate_metrics, feature_extractor_inceptionv3
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
PUBLISHED = "evaluation.reference_statistics"
NAMES = {
    "fid": "frechet_inception_distance",
    "kid_mean": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "is_mean": "inception_score_mean",
    "is_std": "inception_score_std",
}


def theirs(fake: Tensor, real: Tensor, subset: int, batch_size: int, **arguments: Any) -> dict[str, float]:
    settings = {"kid_subset_size": subset, "rng_seed": SEED, "batch_size": batch_size, "cache": False}
    found = fidelity_scores(fake, real, **settings, **arguments)
    return {ours: found[name] for ours, name in NAMES.items()}


def ours(fake: Tensor, real: Tensor, extractor: FeatureExtractor) -> dict[str, float]:
    width = extractor.num_features
    metrics: dict[str, Any] = {
        "fid": FrechetDistance(width),
        "kid": KernelDistance(width, seed=SEED),
        "is": InceptionScore(extractor.num_classes, seed=SEED),
    }
    collection = MetricCollection(metrics)
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
def test_inception_features(random_inception: Path, mnist_dataset: Dataset) -> None:
    images, _ = load_split(mnist_dataset, "test")
    fake, real = images[:12] // 2, images[20:34]
    extractor = InceptionFeatures(random_inception, CPU)
    found = ours(fake, real, extractor)
    named = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(random_inception)}
    rgb = (fake.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1))
    features = extractor(real)[0].double()
    kernel = (features @ features.T / features.shape[1] + 1).pow(3).mean().item()
    compare(found, theirs(rgb[0], rgb[1], 12, 14, **named), kernel)
    # Colour images go in as they are: channel order matters, a grey image equals its copy in three channels.
    coloured = images[:3].view(1, 3, 28, 28)
    features, logits = extractor(torch.cat([rgb[0][:1], coloured, coloured.flip(1)]))
    torch.testing.assert_close(features[0], extractor(fake[:1])[0][0], rtol=1e-4, atol=1e-4)
    assert logits.shape == (3, 1008)
    assert not torch.allclose(features[1], features[2], rtol=1e-3)


@pytest.mark.slow
def test_two_folders(random_inception: Path, mnist_dataset: Dataset, tmp_path: Path) -> None:
    """The same files by both, in colours, grey and JPEG; a real image's place among the others is of no account."""
    images = load_split(mnist_dataset, "test")[0][:39].view(13, 3, 28, 28).permute(0, 2, 3, 1).numpy()
    folders = tmp_path / "ours", tmp_path / "real"
    for number, image in enumerate(images):
        path = folders[number % 2] / f"{number}.{'jpg' if number % 5 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        darker = image // (2 - number % 2)  # or FID would be small beside what it is the difference of
        Image.fromarray(darker if number % 7 else darker[..., 0]).save(path)
    extractor = InceptionFeatures(random_inception, CPU)
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folders[1].iterdir())]
    features = extractor(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))[0].double().numpy()
    np.savez(tmp_path / "published.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    settings = {
        "evaluation.features": ["inception"],
        PUBLISHED: str(tmp_path / "published.npz"),
        "evaluation.inception_weights": str(random_inception),
        "run.root": str(tmp_path / "runs"),
        "runtime.device": "cpu",
    }
    (scores,) = evaluate(folders[0], configure(None, settings), real=folders[1])
    expected = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,  # no workers
        cache=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(random_inception),
    )
    found: dict[str, Any] = scores["features"]["inception"]
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["fid_published"] == pytest.approx(found["fid"], rel=1e-6)
    digest = sha256((tmp_path / "published.npz").read_bytes()).hexdigest()
    assert found["provenance"]["reference_statistics"] == {"path": settings[PUBLISHED], "sha256": digest}
    assert (found["fid_floor"], scores["dataset"], scores["num_images"]) == (None, str(folders[1]), 7)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["evaluations"]
