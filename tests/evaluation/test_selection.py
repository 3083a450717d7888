"""The best checkpoint: which one it is, that it outlives kills and retention, and what is reported of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config, OptimizerConfig
from pipeline.data import Dataset
from pipeline.evaluation.selection import Selection
from pipeline.export.generator_file import load_generator
from pipeline.storage.checkpoint import committed, find
from pipeline.storage.run_folder import RunFolder, step_of
from tests.distributed.interrupting import LIMIT_SECONDS, job, last_step
from tests.jobs import ROOT, changed, flags, launch, tiny_config

TRAIN = ROOT / "pipeline/train.py"
EVERY = 4
"""Steps between two evaluations of `getting_worse`."""


def selection(root: Path, scores: dict[int, dict[str, Any]], **run: Any) -> Selection:
    """Of a run with these scores in mnist features, evaluated every 10 steps."""
    config = tiny_config(run={"root": str(root), **run}, evaluation={"every": 10}, training={"steps": 95})
    folder = RunFolder(config.folder)
    folder.evaluation.mkdir(parents=True)
    settings = {"num_images": 10_000, "reference": "train", "weights": "ema", "seed": 0}
    for step, features in scores.items():
        content = {"step": step, **settings, "features": {"mnist": features}}
        folder.scores(step).write_text(json.dumps(content))
    return Selection(config)


@pytest.mark.parametrize(
    ("keep_best", "values", "order"),
    [
        ("fid", [5.0, 3.0, 4.0], [20, 30, 10]),
        ("mnist.fid", [3.0, None, 3.0], [10, 30]),
        ("kid_mean", [0.1, 0.0, float("nan")], [20, 10]),
        ("is_mean", [5.0, 9.0, 9.0], [20, 30, 10]),
        ("mnist.recall", [0.2, 0.1, 0.3], [30, 10, 20]),
    ],
)
def test_steps_are_ranked_by_the_score_and_equals_by_age(
    keep_best: str, values: list[float | None], order: list[int], tmp_path: Path
) -> None:
    scores = {10 * (i + 1): {keep_best.split(".")[-1]: value} for i, value in enumerate(values)}
    chosen = selection(tmp_path, scores, keep_best=keep_best)
    assert [item.step for item in chosen.ranked([10, 20, 30, 40])] == order
    assert chosen.best_of([10, 20, 30]) == order[0]
    assert chosen.best_of([order[-1]]) == order[-1]
    assert chosen.best_of([]) is None


def test_only_scores_that_compare_and_belong_to_the_training_count(tmp_path: Path) -> None:
    chosen = selection(tmp_path, {step: {"fid": 100.0 - step} for step in (10, 20, 30, 40, 50, 95)}, keep_best="fid")
    folder = RunFolder(tmp_path / "wgan")
    for step, change in ((20, {"num_images": 500}), (30, {"weights": "raw"}), (40, {"seed": 1})):
        content = json.loads(folder.scores(step).read_text())
        folder.scores(step).write_text(json.dumps(content | change))
    folder.scores(50).write_text("{torn")
    folder.scores(15).write_text(folder.scores(10).read_text().replace('"step": 10', '"step": 15'))  # by hand, off beat
    assert [item.step for item in chosen.evaluations(95)] == [10, 95]
    assert [item.step for item in chosen.evaluations(94)] == [10]


def test_scores_of_other_neighbours_do_not_count(tmp_path: Path) -> None:
    """Nor are those of the version before left out, which did not tell their five; FID knows of no neighbours."""
    scores: dict[int, dict[str, Any]] = {step: {"precision": 0.1 * step, "fid": 1.0 * step} for step in (10, 20, 30)}
    scores[10]["provenance"], scores[30]["provenance"] = {"neighbours": 5}, {"neighbours": 3}
    steps = [10, 20, 30]
    assert selection(tmp_path, scores, keep_best="precision").best_of(steps) == 20
    assert selection(tmp_path / "fid", scores, keep_best="fid").best_of(steps) == 10
    assert [item.step for item in selection(tmp_path / "all", scores, keep_best="fid").evaluations(95)] == steps


def test_patience_counts_evaluations_since_the_best(tmp_path: Path) -> None:
    fids = {10: 9.0, 20: 7.0, 30: 7.0, 40: 8.0, 50: 6.0, 60: None, 70: 6.5}
    chosen = selection(tmp_path, {step: {"fid": fid} for step, fid in fids.items()}, keep_best="fid", patience=2)
    assert [step for step in fids if chosen.is_over(step)] == [40, 70]
    assert not selection(tmp_path / "endless", {10: {"fid": 1.0}, 20: {"fid": 2.0}}, keep_best="fid").is_over(20)


def getting_worse(digits: Dataset, root: Path, name: str) -> Config:
    """The generator's rate is so high that from the first steps on its images only get worse."""
    return tiny_config(
        run={"root": str(root), "name": name, "keep_best": "fid", "patience": 2, "keep_last": 1, "log_every": 3},
        data={"dataset": str(digits.folder)},
        network={"width": 0.1},
        training={
            **{"steps": 60, "n_critic": 1, "clip_value": 0.03, "ema_decay": 0.5, "seed": 1},
            "critic_optimizer": OptimizerConfig(learning_rate=2e-4),
            "generator_optimizer": OptimizerConfig(learning_rate=0.02),
        },
        evaluation={"every": EVERY, "num_images": 200},
    )


def fids(run: RunFolder) -> dict[int, float]:
    found = [json.loads(path.read_text()) for path in run.all_scores()]
    return {content["step"]: content["features"]["mnist"]["fid"] for content in found}


def kill_when(path: Path, config: Config, num_processes: int, log: Path) -> None:
    """Trains, and kills a rank as soon as the path is there."""
    with job(config, num_processes, log) as running:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not path.exists():
            assert running.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.ranks[-1].kill()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_gets_worse_ends_early_and_exports_its_best_however_often_it_was_killed(
    num_processes: int, digits: Dataset, tmp_path: Path
) -> None:
    whole, torn = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "torn")
    result = launch(TRAIN, flags(getting_worse(digits, tmp_path, "whole")), num_processes)
    assert result.returncode == 0, result.stderr[-3000:]
    by_step = fids(whole)
    best, last = min(by_step, key=lambda step: by_step[step]), max(by_step)
    assert last == best + 2 * EVERY < 60, by_step
    assert by_step[last] > 1.3 * by_step[best]
    summary = json.loads(whole.report("json").read_text())
    assert summary["status"] == f"finished, step {last} of 60: no better score came"
    assert last_step(whole.path) == last
    assert [step_of(path) for path in committed(whole)] == [best, last]
    for path, step in ((whole.best_export, best), (whole.export, last)):
        saved = find(whole, step).tensors()
        assert all(torch.equal(saved[f"ema.{key}"], value) for key, value in load_generator(path).state_dict().items())
    scores = json.loads(whole.best_scores.read_text())
    assert (scores["step"], scores["last_step"], scores["chosen_by"]["value"]) == (best, last, by_step[best])
    assert scores["seed"] != scores["chosen_by"]["seed"] == 1
    fresh = scores["features"]["mnist"]["fid"]
    assert fresh != by_step[best], "the images that chose it are not those it is reported on"
    assert fresh == pytest.approx(by_step[best], rel=0.2)

    config = getting_worse(digits, tmp_path, "torn")
    moments = {1: (torn.scores(best), torn.scores(last)), 2: (torn.checkpoint(last), torn.best_scores)}
    for moment in moments[num_processes]:
        kill_when(moment, config, num_processes, tmp_path / "log")
    result = launch(TRAIN, flags(config), num_processes)
    assert result.returncode == 0, result.stderr[-3000:]
    assert fids(torn) == by_step
    assert {step_of(path) for path in committed(torn)} >= {best, last}  # a kill may have spared an old one
    assert json.loads(torn.best_scores.read_text()) == scores
    exported, expected = (load_generator(run.best_export).state_dict() for run in (torn, whole))
    assert all(torch.equal(exported[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_a_run_that_ended_goes_on_with_more_patience(digits: Dataset, tmp_path: Path) -> None:
    config, run = getting_worse(digits, tmp_path, "patient"), RunFolder(tmp_path / "patient")
    for patience in (1, 2):
        result = launch(TRAIN, flags(changed(config, run={"patience": patience})))
        assert result.returncode == 0, result.stderr[-3000:]
        by_step = fids(run)
        best, last = min(by_step, key=lambda step: by_step[step]), max(by_step)
        assert last == best + patience * EVERY
        assert [step_of(path) for path in committed(run)] == [best, last]
        assert json.loads(run.best_scores.read_text())["step"] == best
