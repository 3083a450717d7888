"""A run's folder: every path and file name in it, and the log of metrics. Nothing else writes such a name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.files import write_text


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
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def trackers(self) -> Path:
        """Where trackers write, TensorBoard's event files among them."""
        return self.path / "tensorboard"

    @property
    def export(self) -> Path:
        """The last step's generator."""
        return self.path / "export" / "generator.safetensors"

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

    # -- what is there -------------------------------------------------------------------------------------------------

    def grids(self) -> list[tuple[int, Path]]:
        """Step and path of each grid, oldest first."""
        return sorted((int(path.stem), path) for path in self.samples.glob("*.png") if path.stem.isdecimal())

    def all_scores(self) -> list[Path]:
        return sorted(self.evaluation.glob("step-*.json"))

    def newest_interpolation(self) -> Path | None:
        return _newest(self.samples.glob("*-interpolation.png"))

    def newest_neighbours(self) -> Path | None:
        return _newest(self.evaluation.glob("neighbours-*.png"))

    # -- the log of metrics --------------------------------------------------------------------------------------------

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def trim_metrics(self, last_step: int) -> None:
        """Drops the lines after `last_step`, which will be written again, and one that a kill cut short."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.metrics, "".join(kept))


def step_name(step: int) -> str:
    """The name of a step's checkpoint and scores, which sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a name that `step_name` gave, whatever its suffix; None for another name."""
    found = re.fullmatch(r"step-(\d{8,})", path.name.partition(".")[0])
    return int(found[1]) if found else None


def neighbours(scores: Path) -> Path:
    """The picture of nearest training images that lies beside a file of scores."""
    return scores.with_name(f"neighbours-{scores.stem.removeprefix('step-')}.png")


def _newest(paths: Iterator[Path]) -> Path | None:
    return max(paths, default=None, key=lambda path: (len(path.name), path.name))
