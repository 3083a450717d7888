"""The `own` features: a classifier that a command trains on a labelled dataset and that answers for it alone."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import auto_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.config import EvaluationConfig, Parser, RuntimeConfig
from pipeline.data import Dataset, load_dataset
from pipeline.data.prepare import prepare_npz
from pipeline.data.resident import load_split
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluation import train_classifier
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FeatureExtractor, load_features
from pipeline.evaluation.features.classifier import Classifier, near_chance
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.train_classifier import write_classifier
from tests.jobs import restoring_process

CPU = torch.device("cpu")


def bright_quarters(root: Path, shape: tuple[int, int, int], counts: dict[str, int], seed: int = 0) -> Dataset:
    """Noise of shape (C, H, W) in four classes, each with another bright quarter."""
    random = np.random.default_rng(seed)
    channels, height, width = shape
    paths = {}
    for split, count in counts.items():
        labels = np.arange(count) % 4
        images = random.integers(0, 128, (count, channels, height, width), dtype=np.uint8)
        for index, label in enumerate(labels):
            row, column = label // 2 * (height // 2), label % 2 * (width // 2)
            images[index, :, row : row + height // 2, column : column + width // 2] += 100
        paths[split] = root / f"{split}.npz"
        np.savez(paths[split], images=images, labels=labels)
    return prepare_npz(root, "quarters", paths)


def load_own(dataset: Dataset) -> FeatureExtractor:
    return load_features("own", dataset, CPU, EvaluationConfig())


def train(dataset: Dataset, *, seed: int = 0, epochs: int = 10) -> Path:
    write_classifier(str(dataset.folder), seed=seed, epochs=epochs, device="cpu")
    return dataset.folder / "classifier.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset and its classifier: not to be written to."""
    dataset = bright_quarters(tmp_path_factory.mktemp("trained"), (1, 12, 12), {"train": 640, "test": 230})
    train(dataset)
    return dataset


@pytest.fixture
def dataset(trained: Dataset, tmp_path: Path) -> Dataset:
    """A copy of it."""
    shutil.copytree(trained.folder, tmp_path / "copy")
    return load_dataset(tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "counts", "seed"),
    [((3, 10, 20), {"train": 640, "test": 200}, 1), ((1, 36, 9), {"train": 640}, 2), ((3, 5, 7), {"train": 640}, 3)],
)
def test_it_learns_classes_of_any_shape(
    shape: tuple[int, int, int],
    counts: dict[str, int],
    seed: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = bright_quarters(tmp_path, shape, counts, seed)
    path = train(dataset, seed=seed)
    tested = f"{counts['test']} images" if "test" in counts else "64 images held out of train"  # a tenth
    told = re.fullmatch(rf"test accuracy (\d+\.\d\d)% \({tested}\): {path}\n", capsys.readouterr().out)
    assert told is not None
    assert float(told[1]) >= 97
    own = load_own(dataset)
    assert own.class_names == dataset.class_names
    (tmp_path / "fresh").mkdir()
    images, labels = load_split(bright_quarters(tmp_path / "fresh", shape, {"train": 200}, seed=9), "train")
    features, logits = own(images)
    assert (logits.argmax(1) == labels).double().mean() >= 0.97
    assert features.shape == (200, own.num_features)


def test_its_accuracy_is_that_of_the_test_split_and_kept_with_the_scores(dataset: Dataset) -> None:
    own = load_own(dataset)
    images, labels = load_split(dataset, "test")
    accuracy = (own(images)[1].argmax(1) == labels).double().mean().item()
    scores = evaluate_images(ImageSet.of_tensor(images), dataset, [own])["own"]
    provenance, histogram = scores["provenance"], scores["class_histogram"]
    assert isinstance(provenance, dict)
    assert provenance["classifier_test_accuracy"] == pytest.approx(accuracy, abs=5e-5)
    assert provenance["extractor"] == own.fingerprint
    assert isinstance(histogram, dict)
    assert histogram.keys() == {"0", "1", "2", "3"}


def test_features_do_not_depend_on_how_images_are_shared(dataset: Dataset) -> None:
    own = load_own(dataset)
    images, _ = load_split(dataset, "test")
    whole, parts = own(images), [own(part) for part in images.tensor_split([100, 200])]
    for index in (0, 1):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


def test_the_fingerprint_is_that_of_weights_and_dataset(dataset: Dataset, trained: Dataset) -> None:
    before, path = load_own(trained).fingerprint, dataset.folder / "classifier.safetensors"
    assert load_own(dataset).fingerprint == before, "wherever it lies"
    found = []
    for seed in (0, 0, 1):
        path.unlink()
        train(dataset, epochs=1, seed=seed)
        found.append(load_own(dataset).fingerprint)
    assert found[0] == found[1], "the same command gives the same features"
    assert len({before, *found}) == 3
    shutil.copy(trained.folder / "classifier.safetensors", path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    renamed = dataclasses.replace(dataset, name="renamed")
    save_file(load_file(path), path, metadata | {"dataset": renamed.fingerprint})
    assert load_own(renamed).fingerprint != before


def test_a_small_dataset_gets_more_epochs_and_a_large_one_ten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset, asked = bright_quarters(tmp_path, (1, 8, 8), {"train": 600}), list[int]()

    def train(*data: object, epochs: int, **others: object) -> Classifier:
        asked.append(epochs)
        return Classifier((1, 8, 8), 4).eval()

    monkeypatch.setattr(train_classifier, "train", train)
    for epochs, least in ((None, 2_000), (None, 30), (3, 2_000)):
        monkeypatch.setattr(train_classifier, "LEAST_UPDATES", least)
        write_classifier(str(dataset.folder), tmp_path / f"{len(asked)}.safetensors", epochs=epochs, device="cpu")
    assert asked == [500, 10, 3], "540 images are four batches"


def test_features_of_a_classifier_that_guesses_are_warned_of_when_it_is_trained_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = bright_quarters(tmp_path, (1, 8, 8), {"train": 40})
    monkeypatch.setattr(train_classifier, "accuracy", lambda *_: 0.275)
    train(dataset, epochs=1)
    warning = (
        "test accuracy 27.5% where guessing has 25.0%: features `own` mean little, try train-classifier with more than "
        "1 --epochs, or more images\n"
    )
    assert capsys.readouterr().err.endswith(f"classes\n{warning}")
    with restoring_process():
        Scorer(EvaluationConfig(features=["own"]), dataset, Runtime(RuntimeConfig(device="cpu", threads=1)), 0)
    assert warning in "".join(capsys.readouterr())
    # Halfway between guessing and knowing of two classes; of many, three times what guessing has.
    for num_classes, accuracy in ((2, 0.75), (4, 0.625), (10, 0.3)):
        assert near_chance(accuracy + 0.001, num_classes, "") is None
        assert near_chance(accuracy - 0.001, num_classes, "") is not None


def test_without_a_classifier_the_command_is_named(tmp_path: Path) -> None:
    dataset = bright_quarters(tmp_path, (1, 8, 8), {"train": 40})
    with pytest.raises(UserError) as refused:
        load_own(dataset)
    command = f"gan-pipeline train-classifier --dataset {dataset.folder}"
    assert str(refused.value).endswith(f"classifier.safetensors, which is not there: make it with {command}")


def test_a_classifier_of_other_images_is_refused(trained: Dataset, tmp_path: Path) -> None:
    other = bright_quarters(tmp_path, (1, 12, 12), {"train": 640, "test": 230}, seed=5)
    shutil.copy(trained.folder / "classifier.safetensors", other.folder)
    with pytest.raises(UserError, match=r"classifier\.safetensors was trained on another dataset: move it away and"):
        load_own(other)


def test_a_damaged_classifier_is_refused(dataset: Dataset) -> None:
    path = dataset.folder / "classifier.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    save_file(load_file(path), path)
    bare = path.read_bytes()
    for content in (bytes(flipped), whole[:-1], whole[:50], b"", b"weights", bare):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path} is damaged \(.+\): delete it and run") as refused:
            load_own(dataset)
        assert "\n" not in str(refused.value)


def test_what_can_have_no_classifier_is_refused(tmp_path: Path, trained: Dataset) -> None:
    np.savez(tmp_path / "bare.npz", images=np.zeros((20, 8, 8), np.uint8))
    bare = prepare_npz(tmp_path, "bare", {"train": tmp_path / "bare.npz"})
    for refusing in (load_own, train):
        with pytest.raises(UserError, match=r"dataset bare has no classes.* use .*\[inception\].* or \[module:NAME\]"):
            refusing(bare)
    with pytest.raises(UserError, match=r"behind http://host/quarters.* gan-pipeline prepare shards"):
        load_own(dataclasses.replace(trained, base_url="http://host/quarters"))


def test_the_dataset_must_be_named() -> None:
    with pytest.raises(UserError, match=r"required: --dataset; look at --help$"):
        auto_cli(write_classifier, args=[], parser_class=Parser, as_positional=False)


def test_a_classifier_is_never_overwritten(dataset: Dataset) -> None:
    path = dataset.folder / "classifier.safetensors"
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"{path} is there already: move it away"):
        train(dataset, seed=1)
    assert path.read_bytes() == before
