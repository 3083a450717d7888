"""Cached real statistics: used when whole, computed again when damaged, harmless when they cannot be kept."""

from __future__ import annotations

import dataclasses
import pickle
import random
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset, Shard
from pipeline.data.prepare import ShardSizes, prepare_npz
from pipeline.data.resident import load_split
from pipeline.data.shards import Samples, read_shard
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation import extract
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.real_statistics import RealStatistics, real_scores, real_statistics
from tests.jobs import TIMEOUT_SECONDS
from tests.ranks import Job
from tests.trap import Trap


class Counting(FeatureExtractor):
    """An extractor that counts the images it is given."""

    def __init__(self, inner: FeatureExtractor) -> None:
        self.inner, self.count = inner, 0
        self.name, self.fingerprint, self.device = inner.name, inner.fingerprint, inner.device
        self.num_features, self.num_classes = inner.num_features, inner.num_classes
        self.class_names = inner.class_names

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.count += len(images)
        return self.inner._forward(images)


@pytest.fixture
def counting(extractor: FeatureExtractor) -> Counting:
    return Counting(extractor)


def get(dataset: Dataset, extractor: FeatureExtractor, split: str = "test") -> RealStatistics:
    found = real_statistics(dataset, split, extractor)
    assert found is not None
    return found


def equal(ours: RealStatistics, theirs: RealStatistics) -> bool:
    mine, other = ours.tensors, theirs.tensors
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def only_file(dataset: Dataset) -> Path:
    (path,) = (dataset.folder / "features").iterdir()
    return path


def test_the_second_time_costs_nothing_and_gives_the_same(digits: Dataset, counting: Counting) -> None:
    first = get(digits, counting)
    assert counting.count == 610
    assert first.sample.size == first.num_images == first.classes["count"].sum() == 610
    second = get(digits, counting)
    assert counting.count == 610
    assert equal(first, second)


def test_a_split_is_read_a_shard_at_a_time(
    digits_files: dict[str, Path], counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 100 images, batches of 500, shards of 150: when one is read no other is held, and each is read once."""
    dataset = prepare_npz(tmp_path, "small", digits_files, ShardSizes(50, 150))
    whole = get(prepare_npz(tmp_path, "digits", digits_files), counting, "train")
    read: list[str] = []
    alive: set[int] = set()

    def read_and_watch(given: Dataset, shard: Shard) -> Samples:
        assert not alive, "a shard is still held"
        samples = read_shard(given, shard)
        read.append(shard.name)
        alive.add(id(samples))
        weakref.finalize(samples, alive.discard, id(samples))
        return samples

    monkeypatch.setattr(extract, "read_shard", read_and_watch)
    found = get(dataset, counting, "train")
    assert read == [shard.name for shard in dataset.shards("train")]
    assert len(read) == 8
    assert equal(found, whole)
    read.clear()
    second = Ranks(rank=1, world_size=2).share(1150, 100)
    images = ImageSet.of_split(dataset, "train").render(second.start, second.stop)
    assert torch.equal(images, load_split(dataset, "train")[0][second.start :])
    assert read == [shard.name for shard in dataset.shards("train")[4:]], "a rank reads the shards of its share"


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


@pytest.mark.slow
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
    assert get(digits, counting, "test").num_images == 610


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    digits: Dataset, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    (digits.folder / "features").write_text("a file where the folder should be")
    first = get(digits, counting)
    assert equal(first, get(digits, counting))
    assert counting.count == 610, "it stays in memory"
    assert "going on without" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_a_full_disk_costs_only_the_cache(
    digits: Dataset, counting: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"0")

    monkeypatch.setattr("safetensors.torch.save", full)
    assert get(digits, counting).num_images == 610
    assert "No space left" in capsys.readouterr().err
    assert not list((digits.folder / "features").iterdir())


def test_scores_of_real_images_are_kept_for_what_they_depend_on(
    digits: Dataset, counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"scores": {"sliced_wasserstein_floor": 0.1 + 0.2, "authenticity_real": None}, "images": {"of": [3]}}
    calls: list[dict[str, object]] = []

    def compute() -> dict[str, object]:
        calls.append(found)
        return found

    def ask(**facts: object) -> dict[str, object]:
        return real_scores(digits, counting, facts, compute)

    assert ask(controls=1000, seed=0) == ask(controls=1000, seed=0) == found
    assert len(calls) == 1
    path = only_file(digits)
    ask(controls=1000, seed=1)
    ask(controls=999, seed=0)
    counting.fingerprint = "0" * 64
    ask(controls=1000, seed=0)
    assert len(calls) == 4
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0.300", b"0.400"))
    counting.fingerprint = counting.inner.fingerprint
    assert ask(controls=1000, seed=0) == found
    assert len(calls) == 5
    assert "is damaged" in capsys.readouterr().err
    assert ask(controls=1000, seed=0) == found
    assert len(calls) == 5


def test_a_second_evaluation_computes_no_score_of_real_images(
    digits: Dataset, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSet.of_tensor(load_split(digits, "train")[0][:300])
    config = EvaluationConfig(reference="test")
    first = evaluate_images(images, digits, [counting], config)

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("pipeline.evaluation.evaluate.class_floors", refuse)
    monkeypatch.setattr("pipeline.evaluation.evaluate.squared_radii", refuse)
    assert evaluate_images(images, digits, [counting], config) == first
    for number, seed, neighbours in ((300, 1, 5), (300, 0, 4), (200, 0, 5)):
        again, other = ImageSet(number, images.render), dataclasses.replace(config, neighbours=neighbours)
        with pytest.raises(AssertionError, match="computed again"):
            evaluate_images(again, digits, [counting], other, seed=seed)


WRITING = """
import sys, torch
from pipeline.data import load_dataset
from pipeline.evaluation.features.classifier import MnistFeatures
from pipeline.evaluation.real_statistics import _File, real_statistics
dataset = load_dataset(sys.argv[1])
extractor = MnistFeatures(torch.device("cpu"))
real_statistics(dataset, "test", extractor)
file = _File(dataset, extractor, "test")
tensors = file.read()
for _ in range(10):
    file.write(tensors)
    assert file.read() is not None
"""


@pytest.mark.slow
def test_concurrent_runs_leave_one_whole_file(digits: Dataset, counting: Counting, tmp_path: Path) -> None:
    """Three that begin within a tenth of a second."""
    script, log = tmp_path / "writing.py", tmp_path / "log"
    script.write_text(WRITING)
    with ExitStack() as running:
        jobs = [running.enter_context(Job(script, [str(digits.folder)], 1, stdout=log, stderr=log)) for _ in range(3)]
        codes = [job.wait(TIMEOUT_SECONDS) for job in jobs]
    assert (codes, log.read_text()) == ([0, 0, 0], "")
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
