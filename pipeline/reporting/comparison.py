"""Several runs beside each other: the best first, what differs in their settings, seeds of a configuration together."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.config import Config, flatten
from pipeline.errors import UserError
from pipeline.reporting import MISSING, code, duration, number, setting
from pipeline.reporting import SCORES as ALL
from pipeline.reporting.read import OF_NEIGHBOURS, Evaluation, Run, is_run
from pipeline.storage.run_folder import is_beside_runs

SEED = "training.seed"
CONFIGURATION = {*flatten(Config(), free=False), "training.steps"} - {SEED}
"""The settings that two seeds of one configuration share."""
SCORES = {key: ALL[key].title for key in ("fid", "is_mean", "kid_mean", "precision", "recall", "modes", "mode_kl")}
COLUMNS = {**SCORES, "step": "Step", "images_per_second": "Images/s", "total_seconds": "Time", "device_seconds": "Cost"}
"""Key of a value -> title of its column. Columns in which no run has a value are left out."""
MOST_COLUMNS = 8
"""The columns of a table of settings; for more, each becomes a row."""


@dataclass(frozen=True)
class Comparison:
    """Runs, each named by a letter, in the order of their FIDs. Runs whose scores do not compare come after, and runs
    without scores last."""

    runs: dict[str, Run]
    features: str
    """The feature space that most of them are scored in."""
    unlike: dict[str, list[str]]
    """Letter of a run that was scored in another way than the first one -> what differs."""

    @cached_property
    def values(self) -> dict[str, dict[str, float | None]]:
        """Letter -> key of COLUMNS -> value. The scores are the newest ones."""
        values = {}
        for letter, run in self.runs.items():
            newest = run.newest(self.features)
            scores = {key: newest.score(self.features, key) if newest else None for key in SCORES}
            if newest and newest.neighbours(self.features) != self.usual_k:
                scores |= dict.fromkeys(OF_NEIGHBOURS)
            values[letter] = scores | {"step": newest.step if newest else None} | run.timing
        return values

    @property
    def usual_k(self) -> object:
        """The k of the first run's precision and recall, with which those of others compare if theirs is the same."""
        first = next(iter(self.runs.values())).newest(self.features)
        return first.neighbours(self.features) if first else None

    def known(self, letters: Iterable[str], key: str) -> list[float]:
        """Returns the values under a key that these runs have."""
        return [value for letter in letters if (value := self.values[letter].get(key)) is not None]

    @property
    def best(self) -> int | None:
        """The place of the run with the lowest FID among those that compare; None if there are less than two."""
        return 0 if len(self.known(self.runs.keys() - self.unlike.keys(), "fid")) > 1 else None

    @property
    def remarks(self) -> list[str]:
        """Sentences that say which runs do not compare with the first, those for the same reason together, and why."""
        alike: dict[str, list[str]] = {}
        for letter, reasons in self.unlike.items():
            alike.setdefault("; ".join(reasons), []).append(f"{letter} {self.runs[letter].name}")
        return [
            f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} not compare with A: {reason}."
            for reason, names in alike.items()
        ]

    @cached_property
    def settings(self) -> dict[str, list[str]]:
        """Setting that differs -> its value in each run."""
        keys = dict.fromkeys(key for run in self.runs.values() for key in run.config if key != "run.name")
        values = {key: [setting(run.config.get(key, MISSING)) for run in self.runs.values()] for key in keys}
        return {key: row for key, row in values.items() if len(set(row)) > 1}

    @cached_property
    def configurations(self) -> list[tuple[str, list[str]]]:
        """Names and letters of the runs that differ in the seed alone and whose scores compare, the best first, and the
        configuration with the best median first."""
        groups: dict[str, list[str]] = {}
        for letter, run in self.runs.items():
            # Without nulls: runs of earlier versions lack the settings that came after them.
            shared = {key: value for key, value in run.config.items() if key in CONFIGURATION and value is not None}
            if shared and letter not in self.unlike and self.known([letter], "fid"):
                groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(letter)
        ordered = sorted(groups.values(), key=lambda letters: statistics.median(self.known(letters, "fid")))
        return [(self._shared_name(letters), letters) for letters in ordered]

    @property
    def has_seeds(self) -> bool:
        """Whether any configuration has runs of two seeds."""
        seeds = ({str(self.runs[letter].config.get(SEED)) for letter in letters} for _, letters in self.configurations)
        return any(len(each) > 1 for each in seeds)

    def _shared_name(self, letters: Sequence[str]) -> str:
        names = [self.runs[letter].name for letter in letters]
        shared = os.path.commonprefix(names)  # noqa: RUF071 (letters are meant)
        return (re.sub(r"[-_.]?(seed)?[-_.]?$", "", shared) if len(names) > 1 else shared) or names[0]

    # -- tables: rows, each of them title -> text ----------------------------------------------------------------------

    @property
    def scores_table(self) -> list[dict[str, str]]:
        """Each run's scores, their step, what they cost, and how far it is; and why it has no scores."""
        rows = []
        for letter, run in self.runs.items():
            best, newest, state = run.best.get(self.features, {}), run.newest(self.features), [run.status]
            if newest is None:
                state.append(f"not evaluated in {self.features} features" if run.evaluations else "not evaluated")
            elif letter in self.unlike:
                state.append("not compared")
            elif (k := newest.neighbours(self.features)) != self.usual_k:
                state.append(f"precision and recall of k = {setting(k)} do not compare")
            if best and best["step"] != self.values[letter]["step"]:
                state.append(f"best FID {number(best['fid'])} at step {number(best['step'])}")
            if not run.log:
                state.append("no log, so no times")
            rows.append({"Run": f"{letter} {run.name}"} | self._texts(letter) | {"State": "; ".join(state)})
        return rows

    @property
    def seeds_table(self) -> list[dict[str, str]]:
        """Each configuration's medians, and the least and the greatest score."""
        return [
            {"Configuration": name, "Runs": " ".join(letters)} | self._texts(*letters)
            for name, letters in self.configurations
        ]

    def _texts(self, *letters: str) -> dict[str, str]:
        texts = {}
        for key, title in COLUMNS.items():
            if known := self.known(letters, key):
                value = statistics.median(known)
                texts[title] = duration(value) if key == "total_seconds" else number(value)
                if key == "device_seconds":
                    texts[title] += f"\u00a0{self.runs[letters[0]].devices[0]}\u00a0s"
                if key in SCORES and (low := min(known)) < (high := max(known)):
                    texts[title] += f" ({number(low)} to\u00a0{number(high)})"  # one break, for narrow columns
            elif self.known(self.runs, key):
                texts[title] = MISSING
        return texts

    @property
    def settings_table(self) -> list[dict[str, str]]:
        """The settings that differ. Runs that differ in the seed alone are one column, or one row if there are many."""
        keys = [key for key in self.settings if key != SEED or not self.has_seeds]
        alike: dict[tuple[str, ...], str] = {}
        for place, letter in enumerate(self.runs):
            values = tuple(self.settings[key][place] for key in keys)
            alike[values] = f"{alike.get(values, '')} {letter}".strip()
        if len(alike) > MOST_COLUMNS:
            return [{"Runs": letters} | dict(zip(keys, values, strict=True)) for values, letters in alike.items()]
        return [{"Setting": key} | {name: row[place] for row, name in alike.items()} for place, key in enumerate(keys)]

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_markdown(self) -> str:
        """Returns the configurations, or the runs where none has two seeds, as a Markdown table, and the remarks."""
        rows = self.seeds_table if self.has_seeds else self.scores_table
        lines = [rows[0].keys(), ["---"] + ["---:"] * (len(rows[0]) - 1), *(row.values() for row in rows)]
        cells = ([html.escape(cell).replace("|", "&#124;") for cell in line] for line in lines)
        table = "".join(f"| {' | '.join(line)} |\n" for line in cells)
        return "\n- ".join([table, *map(code, self.remarks)]).rstrip() + "\n"

    def to_json(self) -> str:
        """Returns the page's numbers for machines."""
        groups = [
            {"configuration": name, "runs": [self.runs[letter].name for letter in letters]}
            | {key: _spread(known) for key in SCORES if (known := self.known(letters, key))}
            for name, letters in (self.configurations if self.has_seeds else [])
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
        rows = []
        for place, (letter, run) in enumerate(self.runs.items()):
            newest = run.newest(self.features)
            row: dict[str, object] = {"run": run.name} | {key: self.values[letter][key] for key in COLUMNS}
            row["fid_floor"] = newest.score(self.features, "fid_floor") if newest else None
            row["num_images"] = newest.settings.get("num_images") if newest else None
            row |= {"compares": letter not in self.unlike and newest is not None, "status": run.status}
            rows.append(
                row | {"devices": run.devices[0]} | {key: values[place] for key, values in self.settings.items()}
            )
        return rows


def _spread(values: list[float]) -> dict[str, object]:
    return {"median": statistics.median(values), "spread": (min(values), max(values))}


def rank_runs(runs: Sequence[Run]) -> Comparison:
    """Orders runs by the FID of their newest evaluation, those first whose conditions are the most frequent ones."""
    names = [name for run in runs for name in run.features]
    features = max(names, key=names.count, default="")
    newest = [run.newest(features) for run in runs]
    conditions = [item.conditions(features) if item else None for item in newest]
    usual = max(filter(None, conditions), key=conditions.count, default=None)

    def place(index: int) -> tuple[bool, bool, bool, float]:
        fid = item.score(features, "fid") if (item := newest[index]) else None
        return newest[index] is None, conditions[index] != usual, fid is None, fid or 0.0

    order = sorted(range(len(runs)), key=place)
    letters = {index: chr(ord("A") + i % 26) + str(i // 26 or "") for i, index in enumerate(order)}
    first = newest[order[0]]
    unlike = {
        letters[index]: _differences(item, first, features)
        for index in order
        if (item := newest[index]) and first and conditions[index] != usual
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
        matching = Path(literal.anchor).glob(str(literal.relative_to(literal.anchor)))
        paths = [literal] if literal.exists() else sorted(matching)
        runs = [run for path in paths for run in _runs_below(path)]
        if not runs and not (len(patterns) > 1 and is_beside_runs(literal)):
            kind = "a run" if literal.is_dir() else "a folder"
            raise UserError(
                f"{pattern} is not {kind}: give the folder of a run, such as runs/wgan, or a pattern: 'runs/*'"
            )
        folders |= {run.resolve(): run for run in runs}
    return list(folders.values())


def _runs_below(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    if not path.is_dir() or is_beside_runs(path):
        return []
    return [run for child in sorted(path.iterdir()) if child.is_dir() for run in _runs_below(child)]
