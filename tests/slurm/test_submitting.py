"""What chain.sh and sweep.sh submit, without a cluster: a dry run, and an `sbatch` of ours that notes its arguments."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.export.generator_file import save_export
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import random_generator
from tests.jobs import ROOT

TRAIN, EVALUATE, REPORT = (f"launch/slurm/{name}.sbatch" for name in ("train", "evaluate", "report"))


@pytest.fixture
def sbatch(tmp_path: Path) -> Path:
    """A folder for PATH, with an `sbatch` that notes its arguments, a line a call, and prints the number of calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "sbatch"
    note = 'echo "$SWEEP_GRID|$@" | tr "\\n" " "; echo'
    script.write_text(f"#!/bin/sh\n{{ {note}; }} >> {tmp_path}/calls\nwc -l < {tmp_path}/calls\n")
    script.chmod(0o755)
    return folder


def submitted(script: str, *arguments: str, path: Path) -> list[str]:
    environment = os.environ | {"PYTHON_BIN": str(Path(sys.executable).parent), "PATH": f"{path}:{os.environ['PATH']}"}
    command = [str(ROOT / f"launch/slurm/{script}.sh"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def calls(sbatch: Path) -> list[str]:
    path = sbatch.parent / "calls"
    return [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def test_a_dry_chain_prints_what_a_real_one_submits(sbatch: Path, tmp_path: Path) -> None:
    arguments = ["--nodes", "2", "--comment=two words", "--", "--run.root", str(tmp_path), "--run.name", "one"]
    printed = submitted("chain", "--dry-run", *arguments, path=sbatch)
    assert calls(sbatch) == []
    run = str(tmp_path / "one")
    assert [shlex.split(line) for line in printed] == [
        ["sbatch", "--nodes", "2", "--comment=two words", TRAIN, *arguments[4:]],
        ["sbatch", "--kill-on-invalid-dep=yes", "--dependency=afterok:TRAIN", *arguments[:3], EVALUATE, run],
        ["sbatch", "--kill-on-invalid-dep=yes", "--dependency=afterok:EVALUATE", REPORT, run],
    ]
    assert len(submitted("chain", *arguments, path=sbatch)[0].split()) == 3
    assert len(calls(sbatch)) == 3
    assert calls(sbatch)[0] == f"|--parsable --nodes 2 --comment=two words {TRAIN} --run.root {tmp_path} --run.name one"


@pytest.mark.slow
def test_a_sweep_given_again_trains_what_has_not_finished(sbatch: Path, tmp_path: Path) -> None:
    sweep = ["training.seed=0,1,2", "training.n_critic=1,2", "--nodes=1", "--", "--training.steps=9"]
    sweep.append(f"--run.root={tmp_path}/runs")
    names = [f"wgan-seed-{seed}-n_critic-{n_critic}" for seed in (0, 1, 2) for n_critic in (1, 2)]
    runs = [RunFolder(tmp_path / "runs" / name) for name in names]
    report = [REPORT, *(str(run.path) for run in runs), "--out", f"{tmp_path}/runs/comparison.html"]
    first, second = submitted("sweep", "--dry-run", *sweep, path=sbatch)
    assert shlex.split(second) == ["sbatch", "--dependency=afterany:ARRAY", *report]
    assert "SWEEP_GRID=$'training.seed=0,1,2\\ntraining.n_critic=1,2' sbatch --job-name=sweep" in first
    assert "--array=0\\,1\\,2\\,3\\,4\\,5 --nodes=1" in first
    for run in (runs[0], runs[3]):
        save_export(random_generator(), run.export, {"step": 9})
    submitted("sweep", *sweep, path=sbatch)
    array, comparison = calls(sbatch)
    assert array.startswith(
        "training.seed=0,1,2 training.n_critic=1,2|--parsable --job-name=sweep --array=1,2,4,5 --nodes=1"
    )
    assert comparison == " ".join(["|--parsable", "--dependency=afterany:1", *report])
    for run in runs:
        save_export(random_generator(), run.export, {"step": 9})
    assert len(submitted("sweep", *sweep, path=sbatch)[0].split()) == 1
    assert calls(sbatch)[2:] == [" ".join(["|--parsable", *report])], "the comparison alone"
