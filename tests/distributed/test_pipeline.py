"""The main job end to end on real MNIST: trained as the README does, and what comes after."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Config, OptimizerConfig
from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.export.generator_file import load_generator
from pipeline.reporting.read import read_run
from pipeline.storage.checkpoint import find
from pipeline.storage.run_folder import RunFolder
from tests.distributed.interrupting import job
from tests.jobs import ROOT, changed, flags, launch, launch_as_users_do

SMALL = changed(
    Config(),
    run={"name": "small", "log_every": 5, "sample_every": 10, "checkpoint_every": 10},
    network={"width": 0.25},
    training={"n_critic": 1, "steps": 20, "generator_optimizer": OptimizerConfig(learning_rate=1e-3)},
    evaluation={"num_images": 501},
    runtime={"device": "cpu", "threads": 1},
)
pytestmark = pytest.mark.slow
TRAIN, EVALUATE = (ROOT / "pipeline" / name for name in ("train.py", "evaluate.py"))


@pytest.fixture(scope="module")
def run(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    config = changed(SMALL, run={"root": str(root)}, data={"root": str(mnist_dataset.folder.parent)})
    result = launch_as_users_do(TRAIN, flags(config), 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning" not in result.stderr
    assert f"report: {root / 'small/report.html'}" in result.stderr
    return root / "small"


def test_a_run_leaves_everything_that_the_readme_lists(run: Path) -> None:
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [5, 10, 15, 20]
    for name in ("config.yaml", "environment.json", "report.html", "report.md", "report.json"):
        assert (run / name).stat().st_size > 0
    assert {path.name for path in (run / "samples").iterdir()} == {"00010.png", "00020.png", "00020-interpolation.png"}
    fingerprint = json.loads((run / "environment.json").read_text())["dataset_fingerprint"]
    scored = {"step-00000020.json", "neighbours-00000020.png", f"real-{fingerprint[:12]}.png"}
    assert {path.name for path in (run / "evaluation").iterdir()} == scored
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000010", "step-00000020"}
    with Image.open(run / "samples/00020.png") as grid:
        assert grid.size == (244, 244)
    exported = load_generator(run / "export/generator.safetensors").state_dict()
    saved = find(RunFolder(run), 20).tensors()
    assert all((saved[f"ema.{name}"] == tensor).all() for name, tensor in exported.items())


def test_the_evaluation_has_the_designs_form(run: Path) -> None:
    result = json.loads((run / "evaluation/step-00000020.json").read_text())
    assert (result["step"], result["num_images"]) == (20, 501)
    assert result["timing"]["seconds"] > 0
    assert (read_run(run).timing["evaluation_share"] or 0) > 0, "the only evaluation ends after the log and the save"
    scores = result["features"]["mnist"]
    for key in (
        "fid",
        "is_mean",
        "is_std",
        "kid_mean",
        "kid_std",
        "precision",
        "recall",
        "density",
        "coverage",
        "sliced_wasserstein",
        "authenticity",
        "authenticity_real",
    ):
        assert math.isfinite(scores[key]), key
    assert 5 < scores["fid_floor"] < 20, "of as few real images; all 10,000 have 1.04"
    assert scores["fid"] > 20 * scores["fid_floor"], "20 steps do not make digits"


def test_evaluating_again_gives_the_same_scores_for_another_number_of_ranks(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "small")  # other tests look at what the training itself has left
    before = json.loads((run / "evaluation/step-00000020.json").read_text())
    result = launch(EVALUATE, [str(run), "--all", "--evaluation.batch_size", "97"])
    assert result.returncode == 0, result.stderr[-3000:]
    after = json.loads((run / "evaluation/step-00000020.json").read_text())
    for key, value in before["features"]["mnist"].items():
        if isinstance(value, float):
            assert after["features"]["mnist"][key] == pytest.approx(value, rel=1e-6), key
    # Of the live critic of two processes, and of the checkpoint's.
    assert after["critic"]["mean_scores"] == pytest.approx(before["critic"]["mean_scores"], rel=1e-4)
    assert after["critic"]["images"] == {"train": 2000, "test": 2000, "generated": 501}
    assert after["timing"] == before["timing"]
    assert (run / "evaluation/step-00000010.json").exists()


def test_a_signal_during_an_evaluation_stops_the_job_with_the_step_saved(
    mnist_dataset: Dataset, tmp_path: Path
) -> None:
    run, log = tmp_path / "evaluating", tmp_path / "log"
    config = changed(
        SMALL,
        run={"root": str(tmp_path), "name": run.name, "log_every": 1},
        data={"root": str(mnist_dataset.folder.parent)},
        training={"steps": 3},
        evaluation={"num_images": 1_000_000},
    )
    with job(config, 2, log) as process:
        deadline = time.monotonic() + 120
        while not RunFolder(run).checkpoint(3).exists():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)
        process.ranks[1].send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert "stopped after step 3, which is saved" in log.read_text()
    assert not (run / "evaluation/step-00000003.json").exists()


class Evaluate:
    """`evaluate.py TARGET --out FILE ...` in one process; what it wrote."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        # The run's number of threads: it moves a float32 convolution's last digits.
        self.place = ["--data.root", str(dataset.folder.parent), "--runtime.threads", "1"]
        self.folder = folder

    def run(self, target: object, *more: str) -> subprocess.CompletedProcess[str]:
        return launch(EVALUATE, [str(target), *self.place, *more])

    def scores(self, target: object, *more: str) -> dict[str, Any]:
        out = self.folder / f"scores-{len(list(self.folder.iterdir()))}.json"
        result = self.run(target, "--out", str(out), *more)
        assert result.returncode == 0, result.stderr[-3000:]
        return dict(json.loads(out.read_text())["features"]["mnist"])


@pytest.fixture
def evaluate(mnist_dataset: Dataset, tmp_path: Path) -> Evaluate:
    (tmp_path / "scores").mkdir()
    return Evaluate(mnist_dataset, tmp_path / "scores")


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in scores.items() if isinstance(value, float)}


def test_an_export_scores_as_its_run_and_the_raw_generator_does_not(run: Path, evaluate: Evaluate) -> None:
    expected = json.loads((run / "evaluation/step-00000020.json").read_text())["features"]["mnist"]
    count = ["--evaluation.num_images", "501"]
    export = evaluate.scores(run / "export/generator.safetensors", *count)
    assert numbers(export) == pytest.approx(numbers(expected), rel=1e-6)
    raw = evaluate.scores(run, "--evaluation.weights", "raw")
    assert raw["fid"] != pytest.approx(expected["fid"], rel=1e-5)


def test_the_real_test_split_scores_at_the_floor(evaluate: Evaluate) -> None:
    scores = evaluate.scores("test")
    assert scores["fid"] == pytest.approx(scores["fid_floor"], rel=1e-6)  # real features may be another job's
    assert scores["class_accuracy"] > 0.99
    assert abs(scores["precision"] - scores["recall"]) < 0.05


def test_a_folder_of_pictures_and_an_npz_file_score_alike(
    mnist_dataset: Dataset, evaluate: Evaluate, tmp_path: Path
) -> None:
    images, labels = (tensor[:600].numpy() for tensor in load_split(mnist_dataset, "test"))
    order = np.argsort(labels, kind="stable")
    for number, index in enumerate(order):
        place = tmp_path / "digits" / str(labels[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index, 0]).save(place / f"{number:04d}.png")
    np.savez(tmp_path / "digits.npz", images=images[order], labels=labels[order])
    pictures, arrays = (evaluate.scores(tmp_path / name) for name in ("digits", "digits.npz"))
    assert pictures == arrays
    assert pictures["class_accuracy"] > 0.97
    assert pictures["fid"] < 20
    neighbours = pictures["nearest_training_images"]["distances"]
    assert np.shape(neighbours) == (8, 5)
    assert (np.diff(neighbours) >= 0).all()
    with Image.open(sorted(evaluate.folder.glob("neighbours-*.png"))[0]) as picture:
        assert picture.size == (6 * 60 + 4, 8 * 60 + 4)


def test_scores_of_other_images_are_never_overwritten(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "small")  # other tests look at what the training itself has left
    before = (run / "evaluation/step-00000020.json").read_text()
    result = evaluate.run(run, "--step", "20", "--evaluation.num_images", "100")
    assert result.returncode == 0, result.stderr
    assert (run / "evaluation/step-00000020.json").read_text() == before
    other = run / "evaluation/100-images/step-00000020.json"
    assert json.loads(other.read_text())["num_images"] == 100
    (tmp_path / "scores.json").write_text(before)
    result = evaluate.run(run, "--step", "20", "--evaluation.num_images", "100", "--out", str(tmp_path / "scores.json"))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/scores.json: holds other scores (num_images is 501 there and 100 here): "
        "name another file with --out"
    )
    assert (tmp_path / "scores.json").read_text() == before


@pytest.mark.parametrize("target", ["nothing", "empty", "large.npz"])
def test_what_can_not_be_scored_is_refused_in_one_line(target: str, evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "large.npz", images=np.zeros((20, 32, 32), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    result = evaluate.run(tmp_path / target)
    assert result.returncode == 2
    reason = {
        "nothing": "there is nothing of that name; give a run's folder",
        "empty": "holds no image file",
        "large.npz": "holds images of 1 x 32 x 32, the dataset mnist has 1 x 28 x 28",
    }[target]
    assert result.stderr.startswith(f"error: {tmp_path / target}")
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
