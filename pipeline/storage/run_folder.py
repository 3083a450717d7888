"""The folder of a run: where each file lies in it, the log of metrics, and what the run was made with.

No other module knows the name of a file in a run's folder, or of what is written beside runs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.storage.files import fsync, write_text

PACKAGES = ("torch", "accelerate", "webdataset", "torchmetrics", "torch-fidelity", "numpy")
"""Packages whose versions a run records."""
MANIFEST = "manifest.json"  # describes the other files of a checkpoint


@dataclass
class RunFolder:
    """The folder `runs/NAME`, whether it exists or not. Files that belong to a step carry its number."""

    path: Path

    def __post_init__(self) -> None:
        path = self.path
        self.config = path / "config.yaml"
        """All settings, as YAML. A folder with this file is a run."""
        self.environment = path / "environment.json"
        """What `environment_of` returns, the numbers of weights and the dataset's fingerprint, as JSON."""
        self.metrics = path / "metrics.jsonl"
        """The log: a JSON object on each line, with its `step`."""
        self.lock = path / ".lock"
        self.checkpoints, self.samples, self.evaluation = path / "checkpoints", path / "samples", path / "evaluation"
        self.export = path / "export/generator.safetensors"
        """The generator of the last step."""
        self.best_export = path / "export/generator-best.safetensors"
        """The best generator by run.keep_best."""
        self.best_scores = path / "evaluation/best.json"
        """The best generator's scores on images that did not choose it, how it was chosen, and the run's last step."""
        self.trackers = path / "tensorboard"
        """The folder that trackers write to, with TensorBoard's event files."""
        self.tracker_runs = path / "trackers.json"
        """The names that trackers gave this run, as JSON, so that a later launch continues there."""
        self.collectives = path / "collectives-rank-"
        """A prefix: with a rank's number, the last collectives of a GPU run that timed out, for `torchfrtrace`."""

    def report(self, kind: str) -> Path:
        """Returns the path of a report; `kind` is html, md or json."""
        return self.path / f"report.{kind}"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def grid(self, step: int) -> Path:
        return self.samples / f"{step:05d}.png"

    def interpolation(self, step: int) -> Path:
        return self.samples / f"{step:05d}-interpolation.png"

    def scores(self, step: int) -> Path:
        return self.evaluation / f"{step_name(step)}.json"

    def profile(self, first_step: int, last_step: int, rank: int) -> Path:
        """Returns the path of one rank's trace of these steps, in Chrome's format."""
        return self.path / "profile" / f"{step_name(first_step)}-to-{last_step:08d}-rank-{rank}.json.gz"

    # -- what exists ---------------------------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether a run exists here, even if it has no checkpoint yet."""
        return self.config.is_file() or self.metrics.is_file() or bool(self.saved_steps())

    @property
    def has_results(self) -> bool:
        """Whether the run has left anything but its settings and checkpoints."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return logged or any(folder.exists() for folder in (self.evaluation, self.samples, self.export))

    @property
    def dataset_fingerprint(self) -> str | None:
        """The fingerprint of the dataset that the run was trained on; None if its environment does not hold one."""
        try:
            return str(json.loads(self.environment.read_text())["dataset_fingerprint"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def grids(self) -> list[tuple[int, Path]]:
        """Returns step and path of each grid of samples, oldest first."""
        return sorted((int(path.stem), path) for path in self.samples.glob("*.png") if path.stem.isdecimal())

    def saved_steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, oldest first."""
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        return sorted(step for path in paths if not path.suffix and (step := step_of(path)) is not None)

    def all_scores(self) -> list[Path]:
        return sorted(self.evaluation.glob("step-*.json"))

    def newest_interpolation(self) -> Path | None:
        return _newest(self.samples.glob("*-interpolation.png"))

    def newest_neighbours(self) -> Path | None:
        return _newest(self.evaluation.glob("neighbours-*.png"))

    def real_images(self) -> Path | None:
        """Returns the picture of real images of the run's dataset, if there is one."""
        path = real_images(self.evaluation / "any", self.dataset_fingerprint or "")
        return path if path.exists() else None

    # -- the log of metrics --------------------------------------------------------------------------------------------

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def trim_metrics(self, last_step: int) -> None:
        """Drops the lines after `last_step`, which a resumed run writes again, and any line that a kill cut short."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_text(self.metrics, "".join(lines))

    def settle(self) -> None:
        """Waits until the log and the names in the folder are on the disk."""
        for path in (self.metrics, self.path):
            if path.exists():
                fsync(path)


def step_name(step: int) -> str:
    """Returns the name of a step's checkpoint and scores. Names of up to eight digits sort by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Returns the step in a name that `step_name` made, whatever its suffix; None for another name."""
    match = re.fullmatch(r"step-(\d{8,})", path.name.partition(".")[0])
    return int(match[1]) if match else None


def neighbours(scores: Path) -> Path:
    """Returns the path of the picture of nearest training images that belongs to a file of scores."""
    return scores.with_name(f"neighbours-{scores.stem.removeprefix('step-')}.png")


def real_images(scores: Path, fingerprint: str) -> Path:
    """Returns the path beside a file of scores of the picture of the real images of a dataset."""
    return scores.with_name(f"real-{fingerprint[:12]}.png")


def _newest(paths: Iterator[Path]) -> Path | None:
    return max(paths, default=None, key=lambda path: (len(path.name), path.name))


# -- beside the runs ---------------------------------------------------------------------------------------------------


def comparison(folder: Path) -> Path:
    """Returns the path of the page that compares the runs in a folder; its .csv and .json have the same name."""
    return folder / "comparison.html"


def scores_of(target: Path, root: Path) -> Path:
    """Returns the path of the scores of images that belong to no run's step; `root` is the folder of all runs."""
    path, root = target.resolve(), root.resolve()
    name = "-".join(path.relative_to(root).parts) if path.is_relative_to(root) else path.name
    return root / "evaluations" / f"{name}.json"


def is_beside_runs(path: Path) -> bool:
    """Tells whether a path has the name of something that is written among runs but is none, as the two above."""
    return path.name == "evaluations" or path.stem == comparison(path).stem


# -- what a run was made with ------------------------------------------------------------------------------------------


def environment_of(hardware: dict[str, Any], slurm_job_id: str | None) -> dict[str, Any]:
    """Returns date, command, commit, versions and `Runtime.hardware` of this launch, for environment.json."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}",
        "git_commit": _git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        **hardware,
        "hostname": os.uname().nodename,
        "slurm_job_id": slurm_job_id,
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
