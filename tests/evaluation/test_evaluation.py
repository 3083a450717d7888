"""The same images score the same for any number of ranks and any batch size. Real processes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset, load_dataset
from pipeline.data.prepare import ShardSizes, prepare_npz
from pipeline.data.resident import load_split
from pipeline.distributed.collectives import Ranks
from pipeline.errors import EXIT_USER_ERROR, Preempted, UserError
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.interruption import check_interrupted, interruptible, interruptible_on_main, never
from pipeline.rng import sampling_order
from tests.jobs import ROOT, changed, flags, launch, tiny_config

NUM_IMAGES = 1001
BATCH_SIZES = (7, 64, 1000)


def score_many(folder: Path, output: Path, num_processes: int) -> list[list[dict[str, Any]]]:
    """For each rank, what it was given for each batch size."""
    arguments = [str(folder), str(output), *map(str, (NUM_IMAGES, *BATCH_SIZES))]
    result = launch(ROOT / "tests/evaluation/score_many.py", arguments, num_processes)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def jobs(
    mnist_dataset: Dataset, digits_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Path, list[list[dict[str, Any]]]]]:
    """World size -> (dataset's folder, what `score_many` gave). Each starts without cached real features."""
    found = {}
    for num_processes in (1, 2, 4):
        root = tmp_path_factory.mktemp(f"world{num_processes}")
        folder = prepare_npz(root, "digits", digits_files).folder
        found[num_processes] = folder, score_many(folder, root / "scores", num_processes)
    return found


def leaves(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from ((f"{prefix}{key}[{index}]", item) for index, item in enumerate(value))
        else:
            yield prefix + key, value


@pytest.mark.slow
def test_scores_do_not_depend_on_world_size_or_batch_size(
    jobs: dict[int, tuple[Path, list[list[dict[str, Any]]]]],
) -> None:
    expected = dict(leaves(jobs[1][1][0][0]["scores"]))
    assert {
        "fid",
        "fid_interval[1]",
        "recall",
        "fid_per_class.3",
        "class_accuracy",
        "kid_mean",
        "authenticity",
    } <= expected.keys()
    assert 0.1 < expected["precision"] < 0.99
    assert 0.1 < expected["recall"] < 0.99
    alone = [dict(leaves(result["scores"])) for result in jobs[1][1][0]]
    for num_processes, (_, ranks) in jobs.items():
        for rank in ranks:
            for index, batch_size in enumerate(BATCH_SIZES):
                found = dict(leaves(rank[index]["scores"]))
                assert found.keys() == expected.keys()
                for name, value in expected.items():
                    # The generator's images themselves round differently in batches of other sizes.
                    for other, tolerance in ((value, 1e-6), (alone[index][name], 1e-9)):
                        wanted = pytest.approx(other, rel=tolerance) if isinstance(value, float) else other
                        assert found[name] == wanted, (num_processes, batch_size, name)


@pytest.mark.slow
def test_what_is_told_of_a_critic_does_not_depend_on_the_world_size(
    jobs: dict[int, tuple[Path, list[list[dict[str, Any]]]]],
) -> None:
    expected = dict(leaves(jobs[1][1][0][0]["critic"]))
    assert [expected[f"images.{kind}"] for kind in ("train", "test", "generated")] == [1150, 610, 250]
    assert expected["overfitting_error"] > 0
    for _, ranks in jobs.values():
        for rank in ranks:
            assert dict(leaves(rank[0]["critic"])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_every_image_is_rendered_once_and_in_whole_blocks(
    jobs: dict[int, tuple[Path, list[list[dict[str, Any]]]]],
) -> None:
    for num_processes, (_, ranks) in jobs.items():
        for index, unit in enumerate((100, 100, 1000)):
            calls = sorted(call for rank in ranks for call in rank[index]["calls"])
            assert [call[0] for call in calls] == list(range(0, NUM_IMAGES, unit)), num_processes
            assert [call[1] for call in calls] == [*range(unit, NUM_IMAGES, unit), NUM_IMAGES]
    # With batches of 1,000 there are two blocks for four ranks: two ranks have none, and the scores agree all the same.
    assert [len(rank[2]["calls"]) for rank in jobs[4][1]].count(0) == 2


@pytest.mark.slow
def test_real_statistics_do_not_depend_on_the_world_size(
    jobs: dict[int, tuple[Path, list[list[dict[str, Any]]]]],
) -> None:
    splits = "mnist-t*"  # not the scores of real images
    files = {path.name: path for path in (jobs[1][0] / "features").glob(splits)}
    assert len(files) == 2
    for num_processes in (2, 4):
        others = list((jobs[num_processes][0] / "features").glob(splits))
        assert {path.name for path in others} == files.keys()
        for path in others:
            ours, theirs = load_file(path), load_file(files[path.name])
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                if name.endswith((".sum", ".products", ".confidence")):
                    torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-12)
                else:
                    assert torch.equal(ours[name], tensor), name


@pytest.mark.slow
def test_labels_give_the_rate_of_the_asked_class(digits: Dataset, extractor: FeatureExtractor) -> None:
    images, labels = load_split(digits, "test")
    wrong = labels.clone()
    wrong[:305] = (wrong[:305] + 1) % 10

    def accuracy(asked: Tensor | None) -> Any:
        scores = evaluate_images(ImageSet.of_tensor(images[:610], asked), digits, [extractor])
        return scores["mnist"].get("class_accuracy")

    assert accuracy(labels) > 0.98
    assert accuracy(wrong) == pytest.approx(0.5, abs=0.02)
    assert accuracy(None) is None


def test_too_few_images_give_null_scores(digits: Dataset, extractor: FeatureExtractor) -> None:
    images, _ = load_split(digits, "test")
    scores = evaluate_images(ImageSet.of_tensor(images[:5]), digits, [extractor])["mnist"]
    for key in ("precision", "recall", "density", "coverage", "fid_interval", "fid_infinite"):
        assert scores[key] is None
    counts: Any = scores["images"]
    assert counts["kid"] == [5, 1150]
    assert counts["sliced_wasserstein"] == [5, 5]
    assert counts["authenticity"] == [5, 1150]
    assert counts["authenticity_real"] == 5
    assert isinstance(scores["fid"], float)
    json.dumps(scores, allow_nan=False)


@pytest.mark.slow
def test_the_reference_can_be_either_split_and_the_other_gives_the_floor(
    digits: Dataset, extractor: FeatureExtractor
) -> None:
    images, _ = load_split(digits, "train")
    against_test = evaluate_images(
        ImageSet.of_tensor(images[:1150]), digits, [extractor], EvaluationConfig(reference="test")
    )["mnist"]
    assert against_test["fid"] == pytest.approx(against_test["fid_floor"], rel=1e-9)
    against_train = evaluate_images(
        ImageSet.of_tensor(images[:1150]), digits, [extractor], EvaluationConfig(reference="train")
    )["mnist"]
    assert against_train["fid"] == pytest.approx(0, abs=1e-6)
    assert against_train["fid_floor"] == pytest.approx(against_test["fid_floor"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, 610, 900])
def test_the_floor_is_of_as_many_images_as_are_scored(count: int, digits: Dataset, extractor: FeatureExtractor) -> None:
    """As many test images, of 610; the same ones whatever is scored, so they score at it."""
    real = [load_split(digits, split)[0] for split in ("test", "train")]
    places = sampling_order(torch.arange(610)).argsort()[:count].sort().values
    taken = ImageSet.of_tensor(real[0][places])
    found: Any = evaluate_images(ImageSet.of_tensor(real[1][:count]), digits, [extractor])["mnist"]
    itself = evaluate_images(taken, digits, [extractor])["mnist"]
    assert found["fid_floor"] == pytest.approx(itself["fid"], rel=1e-9)
    assert found["images"]["fid_floor"] == min(count, 610)
    per_class = evaluate_images(ImageSet.of_tensor(real[0]), digits, [extractor])["mnist"]

    def with_nan(scores: Any) -> dict[str, float]:
        return {name: math.nan if score is None else score for name, score in scores.items()}

    floors, expected = with_nan(found["fid_per_class_floor"]), with_nan(per_class["fid_per_class"])
    assert floors == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert found["images"]["fid_per_class_floor"] == 610


def test_a_dataset_of_one_split_has_no_floor(
    digits_files: dict[str, Path], extractor: FeatureExtractor, tmp_path: Path
) -> None:
    dataset = prepare_npz(tmp_path, "digits", {"train": digits_files["train"]})
    images, _ = load_split(dataset, "train")
    assert evaluate_images(ImageSet.of_tensor(images[:200]), dataset, [extractor])["mnist"]["fid_floor"] is None
    with pytest.raises(UserError, match="test"):
        evaluate_images(ImageSet.of_tensor(images[:200]), dataset, [extractor], EvaluationConfig(reference="test"))


def test_what_is_not_an_image_is_refused(digits: Dataset, extractor: FeatureExtractor) -> None:
    images, _ = load_split(digits, "test")
    with pytest.raises(ValueError, match="float32"):
        evaluate_images(ImageSet(10, lambda a, b: images[a:b] / 255), digits, [extractor])
    with pytest.raises(ValueError, match="render\\(0, 10\\)"):
        evaluate_images(ImageSet(10, lambda a, b: images[a : b - 1]), digits, [extractor])
    with pytest.raises(ValueError, match="labels"):
        evaluate_images(ImageSet.of_tensor(images[:10], torch.zeros(9, dtype=torch.int64)), digits, [extractor])
    with pytest.raises(UserError, match="num_images"):
        evaluate_images(ImageSet.of_tensor(images[:1]), digits, [extractor])


def test_an_interrupted_evaluation_ends_without_a_score(digits: Dataset, extractor: FeatureExtractor) -> None:
    images, _ = load_split(digits, "test")
    done: list[int] = []

    def render(start: int, stop: int) -> Tensor:
        done.append(stop - start)
        return images[start:stop]

    evaluate_images(ImageSet(210, render), digits, [extractor], EvaluationConfig(batch_size=100))
    assert done == [100, 100, 10]
    done.clear()
    with pytest.raises(Preempted, match="start it again"):
        evaluate_images(
            ImageSet(610, render),
            digits,
            [extractor],
            EvaluationConfig(batch_size=100),
            interrupted=lambda: len(done) == 2,
        )
    assert done == [100, 100]


def test_a_rank_stops_with_another_that_was_interrupted() -> None:
    class WithOneInterrupted(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, Preempted()]

    done = []

    def work() -> None:
        with interruptible(WithOneInterrupted(), never):
            check_interrupted()
            done.append("its share")

    with pytest.raises(Preempted):
        work()
    assert done == ["its share"]
    with interruptible(Ranks(), never):
        check_interrupted()


def test_a_file_that_the_main_rank_cannot_write_is_told_on_every_rank() -> None:
    """Or the others would wait for its result: here of two ranks the second."""

    class Second(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [OSError("no space"), value]

        def broadcast(self, value: Any) -> Any:
            raise AssertionError("the main rank is gone")

    with pytest.raises(OSError, match="no space"):
        interruptible_on_main(Second(1, 2), never, lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True])
def test_a_shard_that_one_rank_finds_damaged_ends_all_of_them_and_is_named(
    known: bool, digits_files: dict[str, Path], tmp_path: Path
) -> None:
    """The last rank alone reads the last shard; where its statistics are known, the main one alone draws images."""
    dataset = load_dataset(prepare_npz(tmp_path, "digits", digits_files, ShardSizes(50, 200), kind="mnist").folder)
    config = tiny_config(data={"dataset": str(dataset.folder)}, run={"root": str(tmp_path)}, evaluation={"every": None})
    split = "train" if known else "test"
    command = ["test" if known else "train", *flags(changed(config, evaluation={"reference": split}))]
    if known:  # and nothing else is
        assert launch(ROOT / "pipeline/evaluate.py", command, 2).returncode == 0
        for left in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.png")):
            if left != dataset.folder / "dataset.json":
                left.unlink()
    shard = dataset.folder / dataset.shards(split)[-1].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = launch(ROOT / "pipeline/evaluate.py", command, 2)
    assert result.returncode == EXIT_USER_ERROR, result.stderr[-3000:]
    assert re.findall("error: .*", result.stderr) == [
        f"error: rank {0 if known else 1}: shard {shard} is damaged: its SHA-256 is not the manifest's; restore the "
        "file, or delete the dataset and prepare it again"
    ]
