"""The main job end to end on real MNIST, as the README runs it."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.checkpoint import find
from pipeline.data import Dataset
from pipeline.export import load_export
from tests.distributed.test_interruptions import job, ranks
from tests.jobs import ROOT, launch

SMALL = [
    *("--network.width", "0.25", "--training.n_critic", "1", "--training.steps", "20", "--run.log_every", "5"),
    *("--run.sample_every", "10", "--run.checkpoint_every", "10", "--evaluation.num_images", "501"),
    *("--training.generator_optimizer.learning_rate", "1e-3", "--runtime.device", "cpu", "--runtime.threads", "1"),
]


@pytest.fixture(scope="module")
def run(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    place = ["--run.root", str(root), "--run.name", "small", "--data.root", str(mnist_dataset.folder.parent)]
    result = launch(ROOT / "pipeline/train.py", [*SMALL, *place], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning" not in result.stderr
    assert f"report: {root / 'small/report.html'}" in result.stderr
    return root / "small"


def test_a_run_leaves_everything_that_the_readme_lists(run: Path) -> None:
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [5, 10, 15, 20]
    for name in ("config.yaml", "environment.json", "report.html", "report.md", "report.json"):
        assert (run / name).stat().st_size > 0
    assert {path.name for path in (run / "samples").iterdir()} == {"00010.png", "00020.png", "00020-interpolation.png"}
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000010", "step-00000020"}
    with Image.open(run / "samples/00020.png") as grid:
        assert grid.size == (244, 244)
    exported = load_export(run / "export/generator.safetensors").state_dict()
    saved = find(run, 20).tensors()
    assert all((saved[f"ema.{name}"] == tensor).all() for name, tensor in exported.items())


def test_the_evaluation_has_the_designs_form(run: Path) -> None:
    result = json.loads((run / "evaluation/step-00000020.json").read_text())
    assert (result["step"], result["num_images"]) == (20, 501)
    scores = result["features"]["mnist"]
    for key in ("fid", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall", "density", "coverage"):
        assert math.isfinite(scores[key]), key
    assert 0.5 < scores["fid_floor"] < 2
    assert scores["fid"] > 50 * scores["fid_floor"], "20 steps do not make digits"


def test_evaluating_again_gives_the_same_scores_for_another_number_of_ranks(run: Path) -> None:
    before = json.loads((run / "evaluation/step-00000020.json").read_text())
    result = launch(ROOT / "pipeline/evaluate.py", [str(run), "--all", "--evaluation.batch_size", "97"])
    assert result.returncode == 0, result.stderr[-3000:]
    after = json.loads((run / "evaluation/step-00000020.json").read_text())
    for key, value in before["features"]["mnist"].items():
        if isinstance(value, float):
            assert after["features"]["mnist"][key] == pytest.approx(value, rel=1e-6), key
    assert (run / "evaluation/step-00000010.json").exists()


def test_a_signal_during_an_evaluation_stops_the_job_with_the_step_saved(
    mnist_dataset: Dataset, tmp_path: Path
) -> None:
    run, log = tmp_path / "evaluating", tmp_path / "log"
    place = ["--run.root", str(tmp_path), "--run.name", run.name, "--data.root", str(mnist_dataset.folder.parent)]
    large = ["--evaluation.num_images", "1000000", "--training.steps", "3", "--run.log_every", "1"]
    with job([*SMALL, *place, *large], 2, log) as process:
        deadline = time.monotonic() + 120
        while not find_step(run, 3):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)
        ranks(process.pid)[1].send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert "stopped after step 3, which is saved" in log.read_text()
    assert not (run / "evaluation/step-00000003.json").exists()


def test_the_benchmark_measures_what_it_says(mnist_dataset: Dataset, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    settings = ["--steps", "10", "--json", str(figures), "--data.root", str(mnist_dataset.folder.parent)]
    result = launch(ROOT / "pipeline/benchmark.py", [*SMALL, *settings], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert all(math.isfinite(value) and value > 0 for value in found.values()), found
    assert found["world_size"] == 2
    assert found["step_seconds_min"] <= found["step_seconds_median"] <= found["step_seconds_max"]
    assert found["images_per_second"] == pytest.approx(64 / found["step_seconds_median"])
    assert found["data_wait_share"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def find_step(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step-{step:08d}").exists()


@pytest.mark.parametrize("target", ["nothing", "empty"])
def test_a_target_that_is_no_run_is_refused_in_one_line(target: str, mnist_dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    data = ["--data.root", str(mnist_dataset.folder.parent)]
    result = launch(ROOT / "pipeline/evaluate.py", [str(tmp_path / target), *data])
    assert result.returncode != 0
    assert f"error: {tmp_path / target}: is neither a run with checkpoints nor an export" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
