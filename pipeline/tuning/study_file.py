"""A study as its YAML file describes it: what is searched, by which score, over which seeds, in how many trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, flatten, read_yaml
from pipeline.errors import UserError
from pipeline.evaluation.selection import named_score

EXAMPLE = "write it as {log: [LOW, HIGH]}, {uniform: [LOW, HIGH]}, {int: [LOW, HIGH]} or {choice: [VALUE, VALUE]}"
Configure = Callable[[Mapping[str, str]], Config]
"""The study's configuration with some settings (dotted key -> text as on the command line) replaced."""


@dataclass(frozen=True)
class Range:
    """What a setting may be."""

    kind: str
    """log: log-uniform; uniform; int: whole numbers, both ends among them; choice: any of the values."""
    values: tuple[Any, ...]
    """Low and high as numbers, or the choices as text."""


@dataclass(frozen=True)
class StudyFile:
    """A study: its file's content, checked."""

    name: str
    score: str
    """As run.keep_best names one."""
    seeds: tuple[int, ...]
    """A trial trains with each; its value is the median of their scores."""
    trials: int
    """Of all workers together."""
    space: dict[str, Range]

    def check(self, configure: Configure) -> None:
        """Whether a configuration takes every end and choice of the space, and gives the score.

        Raises:
            UserError: naming the key and the value.
        """
        config = configure({})
        if config.evaluation.every is None:
            raise UserError("evaluation.every is null: a study needs evaluations, set it to a number of steps")
        named_score(self.score, config.evaluation.features)
        for key, found in self.space.items():
            if key not in flatten(config) or key.startswith("run.") or key == "training.seed":
                raise UserError(f"space.{key} is no setting that can be searched: see train.py --help")
            for value in found.values:
                configure({key: str(value)})

    def settings(self, config: Config) -> dict[str, Any]:
        """What trials must agree on to be of one study, as JSON holds it."""
        whole = flatten(config)
        scoring = {key: value for key, value in whole.items() if key.startswith("evaluation.")}
        fixed = flatten(config, free=False) | scoring | {"training.steps": whole["training.steps"]}
        own = {"score": self.score, "seeds": self.seeds, **{f"space.{key}": vars(r) for key, r in self.space.items()}}
        searched = {*self.space, "training.seed", "evaluation.batch_size", "evaluation.inception_weights"}
        plain = own | {key: value for key, value in fixed.items() if key not in searched}
        return dict(json.loads(json.dumps(plain)))


def read_study(path: Path) -> StudyFile:
    """Reads a study's file; the study has its name.

    Raises:
        UserError: it can't be read, or holds no study.
    """
    match content := read_yaml(path):
        case {"score": str() as score, "seeds": [*seeds], "trials": int() as trials, "space": dict() as space} if (
            len(content) == 4 and seeds and all(type(seed) is int for seed in seeds) and trials > 0 and space
        ):
            ranges = {str(key): _range(f"{path}: space.{key}", given) for key, given in space.items()}
            return StudyFile(path.stem, score, tuple(dict.fromkeys(seeds)), trials, ranges)
    raise UserError(f"{path}: give score: NAME, seeds: [N, ...], trials: N, space: {{KEY: RANGE, ...}}, nothing else")


def _range(where: str, given: Any) -> Range:
    try:
        [(kind, values)] = given.items()
        if kind == "choice" and values:
            return Range(kind, tuple(one if isinstance(one, str) else json.dumps(one) for one in values))
        low, high = map(int if kind == "int" else float, values)
        if kind in ("log", "uniform", "int") and low < high and (kind != "log" or low > 0):
            return Range(kind, (low, high))
    except (AttributeError, TypeError, ValueError):
        pass
    raise UserError(f"{where} is {given}: {EXAMPLE}")
