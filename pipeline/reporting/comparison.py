"""Several runs beside each other: the best first, what differs in their settings, seeds of a configuration together."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipeline.config import Config, flatten
from pipeline.errors import UserError
from pipeline.reporting.read import MISSING, Evaluation, Run, is_run, setting
from pipeline.storage.run_folder import is_beside_runs

SEED = "training.seed"
CONFIGURATION = {*flatten(Config(), free=False), "training.steps"} - {SEED}
"""The settings that two seeds of one configuration share."""
SCORES = ("fid", "is_mean", "kid_mean")


class Seeds(NamedTuple):
    """Runs of one configuration whose scores compare."""

    name: str
    letters: list[str]
    median: dict[str, float | None]
    """Score -> median of the runs; None if none of them has it."""
    spread: dict[str, tuple[float | None, float | None]]
    """Score -> least and greatest value."""


@dataclass(frozen=True)
class Comparison:
    """Runs, each named by a letter, in the order of their FIDs. Runs whose scores do not compare come after, and runs
    without scores last."""

    runs: dict[str, Run]
    features: str
    """The feature space that most of them are scored in."""
    unlike: dict[str, list[str]]
    """Letter of a run that was scored in another way -> what differs."""

    @property
    def standard(self) -> str:
        """The letter of the run that the unlike ones are compared with."""
        return next((letter for letter, run in self.runs.items() if run.newest(self.features)), "")

    def score(self, letter: str, key: str) -> float | None:
        newest = self.runs[letter].newest(self.features)
        return newest.score(self.features, key) if newest else None

    @property
    def best_fid(self) -> float | None:
        """The lowest FID of those that compare; None if there are less than two."""
        letters = [letter for letter in self.runs if letter not in self.unlike]
        alike = [fid for letter in letters if (fid := self.score(letter, "fid")) is not None]
        return min(alike) if len(alike) > 1 else None

    @cached_property
    def settings(self) -> dict[str, list[str]]:
        """Setting that differs -> its value in each run."""
        keys = dict.fromkeys(key for run in self.runs.values() for key in run.config if key != "run.name")
        values = {key: [setting(run.config.get(key, MISSING)) for run in self.runs.values()] for key in keys}
        return {key: row for key, row in values.items() if len(set(row)) > 1}

    @cached_property
    def configurations(self) -> list[Seeds]:
        """Groups of runs that differ in the seed alone, the best median first; empty if none has two seeds."""
        groups: dict[str, list[str]] = {}
        for letter, run in self.runs.items():
            shared = {key: value for key, value in run.config.items() if key in CONFIGURATION}
            if shared and letter not in self.unlike and self.score(letter, "fid") is not None:
                groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(letter)
        seeds = [{str(self.runs[letter].config.get(SEED)) for letter in letters} for letters in groups.values()]
        if max(map(len, seeds), default=0) < 2:
            return []
        return sorted(map(self._seeds, groups.values()), key=lambda group: group.median["fid"] or 0.0)

    def _seeds(self, letters: list[str]) -> Seeds:
        names = [self.runs[letter].name for letter in letters]
        shared = os.path.commonprefix(names)  # noqa: RUF071 (letters are meant)
        name = re.sub(r"[-_.]?(seed)?[-_.]?$", "", shared) if len(names) > 1 else shared
        scores = {key: [self.score(letter, key) for letter in letters] for key in SCORES}
        known = {key: [value for value in values if value is not None] for key, values in scores.items()}
        median = {key: statistics.median(values) if values else None for key, values in known.items()}
        spread = {key: (min(values, default=None), max(values, default=None)) for key, values in known.items()}
        return Seeds(name or names[0], letters, median, spread)

    def to_json(self) -> str:
        """Returns the page's numbers for machines."""
        groups = [
            {
                "configuration": seeds.name,
                "runs": [self.runs[letter].name for letter in seeds.letters],
                **{key: {"median": seeds.median[key], "spread": seeds.spread[key]} for key in SCORES},
            }
            for seeds in self.configurations
        ]
        unlike = {self.runs[letter].name: reasons for letter, reasons in self.unlike.items()}
        content = {"features": self.features, "runs": self._rows, "configurations": groups, "not_compared": unlike}
        return json.dumps(content, indent=1) + "\n"

    def to_csv(self) -> str:
        """Returns a line for each run, the best first. Values that were not measured are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self._rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        return text.getvalue()

    @property
    def _rows(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for place, (letter, run) in enumerate(self.runs.items()):
            newest = run.newest(self.features)
            row: dict[str, object] = {"run": run.name}
            row |= {key: self.score(letter, key) for key in (*SCORES, "fid_floor")}
            row |= (
                {"step": newest.step, "num_images": newest.settings.get("num_images")}
                if newest
                else {"step": None, "num_images": None}
            )
            row |= {"compares": letter not in self.unlike and newest is not None, "status": run.status}
            rows.append(row | {key: values[place] for key, values in self.settings.items()})
        return rows


def rank_runs(runs: Sequence[Run]) -> Comparison:
    """Orders runs by the FID of their newest evaluation, those first whose conditions are the most frequent ones."""
    names = [name for run in runs for name in run.features]
    features = max(names, key=names.count, default="")
    newest = [run.newest(features) for run in runs]
    conditions = [item.conditions(features) if item else None for item in newest]
    known = [item for item in conditions if item is not None]
    usual = max(known, key=known.count, default={})

    def place(index: int) -> tuple[bool, bool, bool, float, int]:
        item = newest[index]
        fid = item.score(features, "fid") if item else None
        return item is None, conditions[index] != usual, fid is None, fid or 0.0, index

    order = sorted(range(len(runs)), key=place)
    letters = {index: chr(ord("A") + i % 26) + str(i // 26 or "") for i, index in enumerate(order)}
    standard = newest[order[0]] if order else None
    unlike = {
        letters[index]: _differences(item, standard, features)
        for index in order
        if (item := newest[index]) and standard and conditions[index] != usual
    }
    return Comparison({letters[index]: runs[index] for index in order}, features, unlike)


def _differences(evaluation: Evaluation, other: Evaluation, features: str) -> list[str]:
    """Returns why the scores of two evaluations do not compare."""

    def describe(item: Evaluation, key: str) -> str:
        value = item.conditions(features)[key]
        if key in ("dataset", "extractor"):
            name = f"{setting(item.settings['dataset'])} " if key == "dataset" and "dataset" in item.settings else ""
            return f"{name}{str(value)[:8]}"
        return f"{value:,}" if isinstance(value, int) else setting(value)

    here, there = evaluation.conditions(features), other.conditions(features)
    keys = [key for key in here if here[key] != there[key]]
    return [f"{key} is {describe(evaluation, key)}, not {describe(other, key)}" for key in keys]


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """Returns the folders of the runs that paths and patterns such as `runs/*` name, each once.

    A folder that is no run stands for all runs below it. What comparisons and evaluations leave beside runs is skipped.

    Raises:
        UserError: A path or pattern names no run.
    """
    folders: dict[Path, Path] = {}
    for pattern in patterns:
        literal = Path(pattern)
        paths = [literal] if literal.exists() or not set("*?[") & set(pattern) else sorted(_matching(pattern))
        runs = [run for path in paths for run in _runs_below(path)]
        if not runs and not (len(patterns) > 1 and is_beside_runs(literal)):
            kind = "a folder" if literal.is_file() or not literal.exists() else "a run"
            raise UserError(
                f"{pattern} is not {kind}: give the folder of a run, such as runs/wgan, or a pattern: 'runs/*'"
            )
        folders |= {run.resolve(): run for run in runs}
    return list(folders.values())


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    return list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _runs_below(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    if not path.is_dir() or is_beside_runs(path):
        return []
    return [run for child in sorted(path.iterdir()) if child.is_dir() for run in _runs_below(child)]
