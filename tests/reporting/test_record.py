"""The seconds until a run was good enough, and the scripts that measure them and make the table of results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import Dataset
from pipeline.reporting.read import read_run
from pipeline.reporting.record import main, seconds_to_fid
from tests.jobs import ROOT
from tests.reporting.made_runs import make_run


@pytest.mark.parametrize(("target", "seconds"), [(136.0, 300.0), (67.8, 600.0), (67.7, 900.0), (45.1, math.inf)])
def test_seconds_end_with_the_first_evaluation_at_the_target(target: float, seconds: float, tmp_path: Path) -> None:
    """The made run's FIDs are 135.6, 67.8 and 45.2 after 1,000, 2,000 and 3,000 steps of 0.3 seconds."""
    assert seconds_to_fid(read_run(make_run(tmp_path / "run")), target) == seconds


def test_a_step_that_was_not_logged_counts_up_to_the_next_one_that_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] % 2000))
    assert seconds_to_fid(read_run(run), 70) == pytest.approx(0.3 * 2050)


def test_median_and_worst_are_a_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / f"seed-{seed}", fid)) for seed, fid in enumerate((30.0, 60.0, 45.0))]
    assert main(["60", *runs]) == 0
    *each, line = capsys.readouterr().out.splitlines()
    assert each == [f"{runs[0]}: 600.0 s", f"{runs[1]}: 900.0 s", f"{runs[2]}: 900.0 s"]
    assert line.endswith("| 3f7c2a9 | 4 x Xeon | 900.0 s | 900.0 s | 3 |  |")
    assert main(["45.5", *runs]) == 3, "one never got there"
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 900.0 s | never | 3 |  |")


@pytest.mark.slow
def test_the_script_trains_each_seed_and_measures_it(scored_digits: Dataset, tmp_path: Path) -> None:
    small = {
        **{"run.root": tmp_path, "run.trackers": "[]", "run.log_every": 1, "data.dataset": scored_digits.folder},
        **{"network.width": 0.05, "training.steps": 2, "training.batch_size": 8, "training.n_critic": 1},
        **{"evaluation.every": 1, "evaluation.num_images": 50},
    }
    arguments = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    result = subprocess.run(
        [ROOT / "launch/speedrun.sh", "configs/wgan.yaml", "3,5", "1e9", "--", *arguments],
        env=os.environ | {"PYTHON_BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    *each, line = result.stdout.splitlines()
    logs = [tmp_path / f"seed-{seed}" / "metrics.jsonl" for seed in (3, 5)]
    first = [json.loads(log.read_text().splitlines()[0]) for log in logs]
    assert each == [f"{log.parent}: {line['elapsed_seconds']:.1f} s" for log, line in zip(logs, first, strict=True)]
    assert line.count("|") == 8
    assert [read_run(log.parent).config["training.seed"] for log in logs] == [3, 5]


@pytest.mark.slow
def test_the_script_of_results_trains_what_is_not_done_and_makes_a_table(
    mnist_dataset: Dataset, tmp_path: Path
) -> None:
    small = {"run.trackers": "[]", "data.root": mnist_dataset.folder.parent, "evaluation.num_images": 50}
    script = [str(ROOT / "launch/results.sh"), "0.001", "3", "rpgan,wgan_gp", "--"]
    script += [text for key, value in small.items() for text in (f"--{key}", str(value))]
    environment = {"PYTHON_BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT), "RUNS": str(tmp_path)}
    for again in (False, True):
        result = subprocess.run(script, env=os.environ | environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("going on from" in result.stderr, "steps, in" in result.stderr) == (False, not again)
    path, *table = result.stdout.splitlines()
    assert path == f"{tmp_path}/results-0.001/comparison.html"
    assert sorted(line.split(" | ")[0][4:] for line in table[2:]) == ["rpgan-seed-3", "wgan_gp-seed-3"]
    assert Path(path).with_suffix(".png").exists()
    runs = [read_run(tmp_path / f"results-0.001/{name}-seed-3") for name in ("rpgan", "wgan_gp")]
    assert [(run.step, run.config["training.objective"], run.config["network.width"]) for run in runs] == [
        (2, "rpgan", 0.25),
        (2, "wgan_gp", 0.25),
    ]
    assert [
        runs[0].config[f"training.{key}"] for key in ("penalty_annealing", "critic_optimizer.annealing_updates")
    ] == [2, 2]


@pytest.mark.slow
def test_the_script_compares_a_run_with_the_log_of_the_notebook(tmp_path: Path) -> None:
    """The losses of step s count up in steps of a hundred and then stay; of the notebook's steps the first is 0."""
    run = make_run(tmp_path / "run")

    def compare(steps: int, first: int = 1) -> subprocess.CompletedProcess[str]:
        losses = ((step, (step - 1) // 100 if step <= 17_701 else step % 2) for step in range(first, steps + 1))
        lines = ({"step": step, "critic_loss": loss, "generator_loss": -loss} for step, loss in losses)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        environment = {"PYTHON_BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
        command = [ROOT / "launch/notebook_log.sh", run]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)

    def table(result: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
        assert result.returncode == 0, result.stderr[-3000:]
        rows = (line.strip("|").split(" | ") for line in result.stdout.splitlines()[2:])
        return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}

    whole = table(compare(22_700))
    assert whole["mean, steps 17,701 to 22,699"] == ["-0.002253", "0.499900", "-0.010701", "-0.499900"]
    assert whole["5th percentile, steps 17,701 to 22,699"] == ["-0.005377", "0.000000", "", "-1.000000"]
    assert whole["mean, 701 to 1,700"] == ["", "11.510000", "", "-11.510000"]
    assert whole["mean, 21,701 to 22,699"] == ["-0.001947", "0.499499", "-0.010165", "-0.499499"]
    assert (run / "notebook_log.png").read_bytes().startswith(b"\x89PNG")
    part = table(compare(1_800))
    assert part["mean, steps 17,701 to 22,699"] == ["-0.002253", "", "-0.010701", ""]
    assert list(part)[-1] == "mean, 701 to 1,700"
    refused = compare(20, first=2)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "train with --run.log_every 1" in refused.stderr
