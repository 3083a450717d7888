"""The feature extractors: the shipped classifier, and Inception v3 with weights from a file or none at all."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from pipeline.checks.machine import check_features
from pipeline.checks.settings import Plan
from pipeline.config import Config, DataConfig, EvaluationConfig, RuntimeConfig, make_parser
from pipeline.data import Dataset, load_dataset
from pipeline.data.prepare import prepare_npz
from pipeline.data.resident import load_split
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluation.features import SPACES, FeatureExtractor, classifier, load_all, load_features
from pipeline.evaluation.features.classifier import MNIST_WEIGHTS, MnistFeatures
from pipeline.evaluation.features.published import InceptionFeatures
from pipeline.evaluation.scorer import Scorer
from tests.jobs import restoring_process
from tests.trap import Trap

CPU = torch.device("cpu")


def described(shape: tuple[int, int, int] = (1, 28, 28)) -> Dataset:
    """A dataset of digits without a file."""
    return Dataset(Path("nowhere"), "digits", shape, tuple("0123456789"), {}, kind="mnist")


def load(name: str, shape: tuple[int, int, int] = (1, 28, 28), **settings: Path) -> FeatureExtractor:
    given = {key: str(path) for key, path in settings.items()}
    return load_features(name, described(shape), CPU, EvaluationConfig(**given))  # type: ignore[arg-type]


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


def test_stacked_digits_are_seen_channel_by_channel(mnist_dataset: Dataset, extractor: FeatureExtractor) -> None:
    digits, labels = load_split(mnist_dataset, "test")
    chosen = torch.randint(len(digits), (230, 3), generator=torch.Generator().manual_seed(0))
    stacked = replace(described((3, 28, 28)), kind="stacked_mnist", class_names=tuple(map(str, range(1000))))
    space = load_features("mnist", stacked, CPU, EvaluationConfig())
    features, logits = space(digits[chosen, 0])
    assert (space.num_features, space.num_classes, space.class_names) == (384, 1000, stacked.class_names)
    parts = [extractor(digits[channel]) for channel in chosen.T]
    torch.testing.assert_close(features, torch.cat([part for part, _ in parts], dim=1), rtol=1e-5, atol=1e-5)
    first, second, third = (part.double().softmax(1) for _, part in parts)
    products = torch.einsum("na,nb,nc->nabc", first, second, third).flatten(1)
    torch.testing.assert_close(logits.double().softmax(1), products, rtol=1e-3, atol=1e-9)
    numbers = labels[chosen] @ torch.tensor([100, 10, 1])
    assert (logits.argmax(1) == numbers).double().mean() > 0.97
    with pytest.raises(UserError, match=r"of shape \(3, 28, 28\), not \(1, 28, 28\)"):
        load_features("mnist", replace(stacked, image_shape=(1, 28, 28)), CPU, EvaluationConfig())


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32), (1, 28, 29)])
def test_mnist_features_refuse_other_shapes(shape: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"\[inception\], \[dinov2\] .* or \[module:NAME\]") as refused:
        load("mnist", shape)
    assert str(shape) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("labelled", [True, False])
def test_mnist_features_refuse_whatever_is_not_mnist(labelled: bool, tmp_path: Path) -> None:
    """Of MNIST's very shape and classes too, unless its manifest says that it is MNIST; programs and doctor alike."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    arrays = {"images": images} | ({"labels": np.arange(60) % 10} if labelled else {})
    np.savez(tmp_path / "clothes.npz", **arrays)  # type: ignore[arg-type]
    clothes = prepare_npz(tmp_path, "clothes", {"train": tmp_path / "clothes.npz"})
    config = Config(data=DataConfig(dataset=str(clothes.folder)), runtime=RuntimeConfig(device="cpu", threads=1))
    with restoring_process(), pytest.raises(UserError) as refused:
        Scorer(config.evaluation, clothes, Runtime(config.runtime), 0)
    command = f"gan-pipeline train-classifier --dataset {clothes.folder}"
    own = f"[own] (made by {command}), " if labelled else ""
    assert f"dataset clothes is of kind own: use evaluation.features {own}[inception], [dinov2] (" in str(refused.value)
    assert '"kind": "mnist" into its dataset.json' in str(refused.value)
    with pytest.raises(UserError, match=r"\[module:NAME\], a network of yours$"):  # whatever it holds, no such digits
        load_features("mnist", replace(clothes, image_shape=(3, 32, 32)), CPU, config.evaluation)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="dataset clothes is of kind own: use"):
        check_features(Plan(config, 1, clothes), "mnist")

    manifest = json.loads((clothes.folder / "dataset.json").read_text())
    (clothes.folder / "dataset.json").write_text(json.dumps(manifest | {"kind": "mnist"}))
    told = load_dataset(clothes.folder)
    assert told.fingerprint == clothes.fingerprint
    assert check_features(Plan(config, 1, told), "mnist") == "mnist, its weights load"


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
    with pytest.raises(UserError, match=r"'fashion'.*mnist, own, inception, dinov2 and module:NAME"):
        load("fashion")


def test_every_space_is_listed_by_the_help() -> None:
    text = " ".join(make_parser("test").format_help().split())  # on a terminal of any width
    after = text.split("Feature spaces:")[1]
    for name in (*SPACES, "module:NAME"):
        assert re.search(rf"\b{name}\b", after.split("--evaluation.reference")[0]), name


def test_two_spaces_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"two spaces of one name \(mnist, mnist\)"):
        load_all(EvaluationConfig(features=["mnist", "mnist"]), described(), CPU)


def test_the_fingerprint_follows_the_weights(
    extractor: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MnistFeatures(CPU).fingerprint == extractor.fingerprint
    assert len(extractor.fingerprint) == 64
    weights = load_file(MNIST_WEIGHTS)
    weights["conv1.bias"][0] += 1e-3
    save_file(weights, tmp_path / "other.safetensors", {"test_accuracy": "0.9950"})
    monkeypatch.setattr(classifier, "MNIST_WEIGHTS", tmp_path / "other.safetensors")
    assert MnistFeatures(CPU).fingerprint != extractor.fingerprint


def test_offline_inception_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "weights-inception-2015-12-05-6726825d.pth"
    assert InceptionFeatures.weights.url == URL_INCEPTION_V3
    assert Path(InceptionFeatures.weights.url).name == name
    nowhere = InceptionFeatures.weights._replace(url=f"http://127.0.0.1:9/{name}")  # nothing listens there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as refused:
        nowhere.fetch(EvaluationConfig())
    message = str(refused.value)
    assert str(tmp_path / "hub" / "checkpoints" / name) in message
    assert "evaluation.inception_weights" in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("*.pth*"))


def test_bad_inception_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load("inception", (1, 28, 28), inception_weights=tmp_path / "missing.pth")
    (tmp_path / "noise.pth").write_bytes(os.urandom(5000))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    whole = (tmp_path / "other.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("noise", "other", "short", "empty", "list"):
        with pytest.raises(UserError, match=rf"{name}\.pth") as refused:
            load("inception", (1, 28, 28), inception_weights=tmp_path / f"{name}.pth")
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="1 or 3 channels"):
        load("inception", (2, 28, 28), inception_weights=tmp_path / "other.pth")


def test_a_pickle_in_place_of_the_weights_is_not_executed(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth"):
        load("inception", (1, 28, 28), inception_weights=tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()
