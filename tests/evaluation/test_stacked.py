"""A tiny run on Stacked MNIST, from preparing to scores. Real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.data.prepare import prepare_known
from pipeline.data.resident import load_split
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features.classifier import MnistFeatures
from pipeline.reporting import counted
from pipeline.reporting.read import read_run
from tests.jobs import ROOT, environment, flags, launch, tiny_config


@pytest.fixture(scope="module")
def stacked(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("stacked")
    (root / "mnist").symlink_to(mnist_dataset.folder)
    return prepare_known("stacked_mnist", root, num_images=(1000, 450))


def tiny(stacked: Dataset, root: Path) -> Config:
    return tiny_config(
        run={"root": str(root), "name": "tiny"},
        data={"dataset": "stacked_mnist", "root": str(stacked.folder.parent)},
        training={"steps": 2, "n_critic": 1},
        evaluation={"every": 2, "num_images": 420},
    )


@pytest.mark.slow
def test_a_run_is_scored_alike_by_one_rank_and_by_two(stacked: Dataset, tmp_path: Path) -> None:
    result = launch(ROOT / "pipeline/train.py", flags(tiny(stacked, tmp_path)))
    assert result.returncode == 0, result.stderr[-3000:]
    run, other = tmp_path / "tiny", tmp_path / "other.json"
    result = launch(ROOT / "pipeline/evaluate.py", [str(run), "--out", str(other)], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads((run / "evaluation/step-00000002.json").read_text())
    scores, others = content["features"]["mnist"], json.loads(other.read_text())["features"]["mnist"]
    assert scores["modes"] == sum(share > 0 for share in scores["class_histogram"].values()) > 0
    assert scores["mode_kl"] > scores["mode_kl_floor"] > 0
    assert scores["images"]["modes_floor"] == 420
    for key, value in scores.items():
        if isinstance(value, float):
            assert others[key] == pytest.approx(value, rel=1e-6), key
    assert others["class_histogram"] == scores["class_histogram"]
    assert f"{counted(scores['modes'], 'mode')}, KL {scores['mode_kl']:.2f}" in result.stderr
    assert read_run(run).scored("mnist", "mode_kl").values == [scores["mode_kl"]]
    assert f"KL from uniform {scores['mode_kl']:.2f}" in (run / "report.md").read_text()


def test_real_stacks_score_at_the_floor(stacked: Dataset) -> None:
    """All test images are the images of their own floor; images of 17 classes have these modes alone."""
    images, labels = load_split(stacked, "test")
    space = MnistFeatures(torch.device("cpu"), 3)

    def score(chosen: torch.Tensor) -> dict[str, Any]:
        return evaluate_images(ImageSet.of_tensor(images[chosen], labels[chosen]), stacked, [space])["mnist"]

    every = score(torch.arange(450))
    shown = sorted(set(labels.tolist()))
    assert every["modes"] == every["modes_floor"] == pytest.approx(len(shown), abs=3)
    assert every["mode_kl"] == pytest.approx(every["mode_kl_floor"], rel=1e-12)
    assert every["mode_kl_interval"] is None, "less than one image a class"
    assert every["fid"] == pytest.approx(every["fid_floor"], rel=1e-9)
    assert every["class_accuracy"] > 0.97
    few = score(torch.isin(labels, torch.tensor(shown[:17])).nonzero()[:, 0])
    assert few["modes"] == pytest.approx(17, abs=1)
    assert few["mode_kl"] > few["mode_kl_floor"] > 3


@pytest.mark.slow
def test_the_script_compares_four_losses(stacked: Dataset, tmp_path: Path) -> None:
    settings = [flag for flag in flags(tiny(stacked, tmp_path)) if "run.name" not in flag]
    result = subprocess.run(
        [ROOT / "launch/stacked_mnist.sh", *settings, "--evaluation.num_images=60"],
        env=environment() | {"PYTHON_BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    names = ["rpgan R1 R2", "gan R1 R2", "rpgan R1", "gan R1"]
    rows = [line.strip("|").split("|") for line in result.stdout.splitlines()[-4:]]
    assert [row[0].strip() for row in rows] == names
    for name, row in zip(names, rows, strict=True):
        run = read_run(tmp_path / name.lower().replace(" ", "-"))
        assert [cell.strip() for cell in row[1:3]] == ["2", f"{run.scored('mnist', 'modes').values[-1]:.0f}"]
        assert run.config["training.objective"] == name.split()[0]
        assert (run.config["training.r2_penalty"] is None) == (not name.endswith("R2"))
