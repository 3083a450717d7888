"""Cached real features: used when whole, computed again when damaged, harmless when they cannot be kept."""

from __future__ import annotations

import dataclasses
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.data import Dataset
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.real_statistics import RealFeatures, real_features
from tests.jobs import ROOT, TIMEOUT_SECONDS, environment
from tests.trap import Trap


class Counting(FeatureExtractor):
    """An extractor that counts the images it is given."""

    def __init__(self, inner: FeatureExtractor) -> None:
        self.inner, self.count = inner, 0
        self.name, self.fingerprint, self.device = inner.name, inner.fingerprint, inner.device
        self.num_features, self.num_classes = inner.num_features, inner.num_classes

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.count += len(images)
        return self.inner._forward(images)


@pytest.fixture
def counting(extractor: FeatureExtractor) -> Counting:
    return Counting(extractor)


def get(dataset: Dataset, extractor: FeatureExtractor, split: str = "test") -> RealFeatures:
    found = real_features(dataset, split, extractor)
    assert found is not None
    return found


def equal(ours: RealFeatures, theirs: RealFeatures) -> bool:
    pairs = [
        (ours.features, theirs.features),
        (ours.logits, theirs.logits),
        (ours.moments.mean, theirs.moments.mean),
        (ours.moments.covariance, theirs.moments.covariance),
    ]
    return all(torch.equal(a, b) for a, b in pairs) and ours.moments.num_images == theirs.moments.num_images


def only_file(dataset: Dataset) -> Path:
    (path,) = (dataset.folder / "features").iterdir()
    return path


def test_the_second_time_costs_nothing_and_gives_the_same(digits: Dataset, counting: Counting) -> None:
    first = get(digits, counting)
    assert counting.count == 610
    assert len(first.features) == len(first.logits) == first.moments.num_images == 610
    second = get(digits, counting)
    assert counting.count == 610
    assert equal(first, second)


def test_another_split_dataset_or_network_has_a_file_of_its_own(
    digits: Dataset, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    get(digits, counting)
    get(digits, counting, "train")
    assert counting.count == 610 + 1150
    get(dataclasses.replace(digits, name="other"), counting)
    assert counting.count == 2 * 610 + 1150
    counting.fingerprint = "0" * 64
    get(digits, counting)
    assert counting.count == 3 * 610 + 1150
    assert len(list((digits.folder / "features").iterdir())) == 4
    assert "damaged" not in capsys.readouterr().err


def test_damage_anywhere_is_noticed_and_repaired(
    digits: Dataset, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = get(digits, counting)
    path = only_file(digits)
    content = path.read_bytes()
    positions = list(range(0, 900, 75)) + random.Random(0).sample(range(900, len(content)), 6) + [len(content) - 1]
    damaged = [content[:p] + bytes([content[p] ^ (1 << p % 8)]) + content[p + 1 :] for p in positions]
    damaged += [content[: len(content) // 2], content[:3], b"", content + b"\0"]
    for number, bad in enumerate(damaged):
        path.write_bytes(bad)
        capsys.readouterr()
        counting.count = 0
        assert equal(get(digits, counting), whole), number
        assert counting.count == 610, number
        notices = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
        assert len(notices) == 1
        assert str(path) in notices[0]
        assert equal(get(digits, counting), whole)
        assert counting.count == 610, number


def test_a_file_of_another_key_is_not_believed(digits: Dataset, counting: Counting) -> None:
    """A whole file under another's name: its own key is inside."""
    get(digits, counting, "train")
    train = only_file(digits)
    content = train.read_bytes()
    train.unlink()
    get(digits, counting, "test")
    only_file(digits).write_bytes(content)
    assert get(digits, counting, "test").moments.num_images == 610


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    digits: Dataset, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    (digits.folder / "features").write_text("a file where the folder should be")
    first = get(digits, counting)
    assert equal(first, get(digits, counting))
    assert counting.count == 2 * 610
    assert "going on without" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_a_full_disk_costs_only_the_cache(
    digits: Dataset, counting: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.evaluation import real_statistics

    def full(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"0")

    monkeypatch.setattr(real_statistics, "save_file", full)
    assert get(digits, counting).moments.num_images == 610
    assert "No space left" in capsys.readouterr().err
    assert not list((digits.folder / "features").iterdir())


def test_concurrent_runs_leave_one_whole_file(digits: Dataset, counting: Counting) -> None:
    script = """
import sys, torch
from pipeline.data import load_dataset
from pipeline.evaluation.features.mnist import MnistFeatures
from pipeline.evaluation.real_statistics import real_features, _read, _write
dataset = load_dataset(sys.argv[1])
extractor = MnistFeatures(torch.device("cpu"))
print("ready", flush=True)
input()
real = real_features(dataset, "test", extractor)
path = next(path for path in (dataset.folder / "features").iterdir() if path.suffix == ".safetensors")
import safetensors
key = safetensors.safe_open(path, "pt").metadata()["key"]
for _ in range(10):
    _write(path, key, real)
    assert _read(path, key) is not None
"""
    command = [sys.executable, "-c", script, str(digits.folder)]
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen(command, env=environ, text=True, stdin=-1, stdout=-1, stderr=-1) for _ in range(3)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    results = [run.communicate("\n", timeout=TIMEOUT_SECONDS) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], results
    assert not any("damaged" in errors or "going on without" in errors for _, errors in results)
    only_file(digits)
    get(digits, counting)
    assert counting.count == 0


def test_a_pickle_in_place_of_the_cache_is_computed_again_and_not_executed(
    digits: Dataset, counting: Counting, tmp_path: Path
) -> None:
    before = get(digits, counting)
    only_file(digits).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    assert equal(get(digits, counting), before)
    assert counting.count == 2 * digits.num_images("test")
    assert not (tmp_path / "executed").exists()
