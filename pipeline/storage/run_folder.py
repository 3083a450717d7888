"""A run's folder: every path and file name in it, and the log of metrics. Nothing else writes such a name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.files import fsync, write_text


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME`, whether it is there or not. Files of a step carry its number."""

    path: Path

    @property
    def config(self) -> Path:
        """Every setting, YAML. Its presence makes a folder a run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, commit, the dataset's fingerprint: JSON."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """A JSON object a line, each with its `step`."""
        return self.path / "metrics.jsonl"

    @property
    def has_begun(self) -> bool:
        """Whether a run is here, be it without a checkpoint."""
        return self.config.is_file() or self.metrics.is_file() or self.checkpoints.is_dir()

    @property
    def dataset_fingerprint(self) -> str | None:
        """Of the dataset that the run was trained on; None where its environment does not tell."""
        try:
            return str(json.loads(self.environment.read_text())["dataset_fingerprint"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def trackers(self) -> Path:
        """Where trackers write, TensorBoard's event files among them."""
        return self.path / "tensorboard"

    @property
    def tracker_runs(self) -> Path:
        """The names that trackers have for this run, JSON: a launch that goes on with it goes on in them."""
        return self.path / "trackers.json"

    @property
    def export(self) -> Path:
        """The last step's generator."""
        return self.path / "export" / "generator.safetensors"

    @property
    def collectives(self) -> Path:
        """Before a rank's number: the last collectives of a run on GPUs that timed out, for `torchfrtrace`."""
        return self.path / "collectives-rank-"

    @property
    def best_export(self) -> Path:
        """The best generator by run.keep_best."""
        return self.path / "export" / "generator-best.safetensors"

    @property
    def best_scores(self) -> Path:
        """Scores of the best generator on images that did not choose it, how it was chosen, and the run's last step."""
        return self.evaluation / "best.json"

    def report(self, kind: str) -> Path:
        """`kind`: html, md or json."""
        return self.path / f"report.{kind}"

    # -- of a step -----------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def grid(self, step: int) -> Path:
        return self.samples / f"{step:05d}.png"

    def interpolation(self, step: int) -> Path:
        return self.samples / f"{step:05d}-interpolation.png"

    def scores(self, step: int) -> Path:
        return self.evaluation / f"{step_name(step)}.json"

    def profile(self, first_step: int, last_step: int, rank: int) -> Path:
        """A rank's trace of these steps, Chrome's format."""
        return self.path / "profile" / f"{step_name(first_step)}-to-{last_step:08d}-rank-{rank}.json.gz"

    # -- what is there -------------------------------------------------------------------------------------------------

    def grids(self) -> list[tuple[int, Path]]:
        """Step and path of each grid, oldest first."""
        return sorted((int(path.stem), path) for path in self.samples.glob("*.png") if path.stem.isdecimal())

    def all_scores(self) -> list[Path]:
        return sorted(self.evaluation.glob("step-*.json"))

    def newest_interpolation(self) -> Path | None:
        return _newest(self.samples.glob("*-interpolation.png"))

    def real_images(self) -> Path | None:
        """The picture of real images of the dataset that the run was trained on."""
        name = f"real-{(self.dataset_fingerprint or '')[:12]}.png"
        return next((path for path in self.evaluation.glob("real-*.png") if path.name == name), None)

    def newest_neighbours(self) -> Path | None:
        return _newest(self.evaluation.glob("neighbours-*.png"))

    def has_results(self) -> bool:
        """Whether the run has left anything but its settings."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return logged or any(folder.exists() for folder in (self.evaluation, self.samples, self.export))

    # -- the log of metrics --------------------------------------------------------------------------------------------

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def settle(self) -> None:
        """Waits until the log's lines and the names in the folder are on the disk: a checkpoint must not outlive the
        lines of the steps before it, nor the name of the folder that it is in."""
        for path in (self.metrics, self.path):
            if path.exists():
                fsync(path)

    def trim_metrics(self, last_step: int) -> None:
        """Drops the lines after `last_step`, which will be written again, and one that a kill cut short."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_text(self.metrics, "".join(kept))


def step_name(step: int) -> str:
    """The name of a step's checkpoint and scores, which sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a name that `step_name` gave, whatever its suffix; None for another name."""
    found = re.fullmatch(r"step-(\d{8,})", path.name.partition(".")[0])
    return int(found[1]) if found else None


def comparison(folder: Path) -> Path:
    """The page that compares the runs of a folder; its numbers are beside it as .csv and .json."""
    return folder / "comparison.html"


def is_beside_runs(path: Path) -> bool:
    """Whether a path has the name of what is written among runs but is none: comparisons, scores of other images."""
    return path.name == "evaluations" or path.stem == comparison(path).stem


def scores_of(target: Path, root: Path) -> Path:
    """Where the scores go of images that belong to no run's step: under `root`, the folder of all runs."""
    path, root = target.resolve(), root.resolve()
    name = "-".join(path.relative_to(root).parts) if path.is_relative_to(root) else path.name
    return root / "evaluations" / f"{name}.json"


def neighbours(scores: Path) -> Path:
    """The picture of nearest training images that lies beside a file of scores."""
    return scores.with_name(f"neighbours-{scores.stem.removeprefix('step-')}.png")


def real_images(scores: Path, fingerprint: str) -> Path:
    """The picture of real images of the dataset with this fingerprint that lies beside files of scores."""
    return scores.with_name(f"real-{fingerprint[:12]}.png")


def _newest(paths: Iterator[Path]) -> Path | None:
    return max(paths, default=None, key=lambda path: (len(path.name), path.name))
