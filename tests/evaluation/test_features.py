"""The feature extractors: the shipped classifier, and Inception v3 with weights from a file or none at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, inception, load_features, mnist
from pipeline.evaluation.features.mnist import MNIST_WEIGHTS
from tests.trap import Trap

CPU = torch.device("cpu")


def test_the_shipped_classifier_is_small_and_accurate(mnist_dataset: Dataset, extractor: FeatureExtractor) -> None:
    images, labels = load_split(mnist_dataset, "test")
    _, logits = extractor(images)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy >= 0.993
    assert MNIST_WEIGHTS.stat().st_size < 2_000_000
    with safe_open(MNIST_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["test_accuracy"]) == pytest.approx(accuracy, abs=2e-4)
    assert "train_classifier" in metadata["command"]
    assert metadata["seed"] == "0"


def test_features_and_logits_belong_together(extractor: FeatureExtractor) -> None:
    images = torch.randint(0, 256, (130, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, logits = extractor(images)
    assert found.shape == (130, extractor.num_features)
    assert found.dtype == logits.dtype == torch.float32
    assert found.min() == 0  # after a ReLU
    assert found.max() > 1
    weights = load_file(MNIST_WEIGHTS)
    torch.testing.assert_close(logits, found @ weights["head.weight"].T + weights["head.bias"], rtol=1e-4, atol=1e-3)


def test_forward_passes_hold_the_same_images_whatever_the_call(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (230, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []
    forward = extractor._forward

    def recording(part: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(part))
        return forward(part)

    monkeypatch.setattr(extractor, "_forward", recording)
    whole = extractor(images)
    assert sizes == [100, 100, 30]
    parts = [extractor(part) for part in images.tensor_split([100, 200])]
    for index in (0, 1):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32), (1, 28, 29)])
def test_mnist_features_refuse_other_images(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="inception") as refused:
        load_features("mnist", CPU, shape, None)
    assert str(shape) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_images_are_never_rescaled(extractor: FeatureExtractor) -> None:
    with pytest.raises(TypeError, match="float32"):
        extractor(torch.zeros(2, 1, 28, 28))


def test_features_are_never_computed_in_tensor_float_32(
    extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in cuDNN's convolutions nor in cuBLAS's products, whatever the training runs in."""
    seen: list[tuple[bool, bool]] = []
    forward = extractor._forward

    def recording(part: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return forward(part)

    monkeypatch.setattr(extractor, "_forward", recording)
    matmul = torch.backends.cuda.matmul
    try:
        matmul.allow_tf32 = True
        extractor(torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
        assert seen == [(False, False)]
        assert matmul.allow_tf32, "given back"
    finally:
        matmul.allow_tf32 = False


def test_an_unknown_feature_space_is_refused() -> None:
    with pytest.raises(UserError, match=r"'fashion'.*mnist, inception"):
        load_features("fashion", CPU, (1, 28, 28), None)


def test_the_fingerprint_follows_the_weights(
    extractor: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_features("mnist", CPU, (1, 28, 28), None).fingerprint == extractor.fingerprint
    assert len(extractor.fingerprint) == 64
    weights = load_file(MNIST_WEIGHTS)
    weights["conv1.bias"][0] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    monkeypatch.setattr(mnist, "MNIST_WEIGHTS", tmp_path / "other.safetensors")
    assert load_features("mnist", CPU, (1, 28, 28), None).fingerprint != extractor.fingerprint


def test_offline_inception_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "weights-inception-2015-12-05-6726825d.pth"
    assert URL_INCEPTION_V3 == inception.URL
    assert Path(inception.URL).name == name
    monkeypatch.setattr(inception, "URL", f"http://127.0.0.1:9/{name}")  # nothing listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as refused:
        load_features("inception", CPU, (1, 28, 28), None)
    message = str(refused.value)
    assert str(tmp_path / "hub" / "checkpoints" / name) in message
    assert "evaluation.inception_weights" in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("*.pth*"))


def test_bad_inception_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_features("inception", CPU, (1, 28, 28), tmp_path / "missing.pth")
    (tmp_path / "noise.pth").write_bytes(os.urandom(5000))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("noise", "other", "short", "empty", "list"):
        with pytest.raises(UserError, match=rf"{name}\.pth") as refused:
            load_features("inception", CPU, (1, 28, 28), tmp_path / f"{name}.pth")
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="1 or 3 channels"):
        load_features("inception", CPU, (2, 28, 28), tmp_path / "other.pth")


def test_a_pickle_in_place_of_the_weights_is_not_executed(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth"):
        load_features("inception", CPU, (1, 28, 28), tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()
