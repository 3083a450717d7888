"""A run's folder -> `Run`, what a report needs of it: nothing is computed again, and what is damaged becomes a note."""

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, flatten, read_yaml
from pipeline.errors import UserError
from pipeline.storage.run_folder import RunFolder

OF_NEIGHBOURS = ("precision", "recall", "density", "coverage")
USUAL_NEIGHBOURS = 5
"""Their k in files of scores that do not tell it."""


def parse_json(path: Path) -> object:
    """A JSON file; NaN and infinities are missing values."""
    return parse_json_text(path.read_text(encoding="utf-8"))


parse_json_text = functools.partial(json.loads, parse_constant=lambda _: None)


def finite(value: object) -> float | None:
    """The number, or None for what is not one or could not be drawn: NaN, infinity and their like."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


@dataclass(frozen=True)
class Curve:
    """Values over steps, as many as steps; `band` holds the [low, high] around each value."""

    steps: list[float]
    values: list[float]
    band: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Evaluation:
    """One file of scores: how images were scored, and feature set -> score -> value."""

    step: int
    settings: dict[str, object]
    features: dict[str, dict[str, object]]

    def score(self, features: str, key: str) -> float | None:
        return finite(self.features.get(features, {}).get(key))

    def about(self, key: str) -> dict[str, object]:
        """What stands beside the feature sets: "critic" or "gan_train"; empty if it is not there."""
        found = self.settings.get(key)
        return found if isinstance(found, dict) else {}

    def images(self, features: str) -> dict[str, object]:
        """Metric -> how many images it took."""
        images = self.features.get(features, {}).get("images")
        return images if isinstance(images, dict) else {}

    def way(self, features: str, key: str = "fid") -> dict[str, object]:
        """How the images were scored: scores `key` compare where all of it is equal. Fingerprints tell what it was."""
        provenance = self.features.get(features, {}).get("provenance")
        known = provenance if isinstance(provenance, dict) else {}
        settings = {key: self.settings.get(key) for key in ("num_images", "reference", "weights")}
        used = {key: known.get(key) for key in ("dataset", "extractor")}
        return settings | used | ({"neighbours": self.neighbours(features)} if key in OF_NEIGHBOURS else {})

    def neighbours(self, features: str) -> object:
        """The k of precision and what is like it."""
        provenance = self.features.get(features, {}).get("provenance")
        return provenance.get("neighbours", USUAL_NEIGHBOURS) if isinstance(provenance, dict) else USUAL_NEIGHBOURS

    def band(self, features: str, value: float, spread: str) -> tuple[float, float]:
        """The [low, high] around a score; `spread` names it or a standard deviation, missing counts as 0."""
        around = self.features[features].get(spread)
        match [finite(end) for end in around] if isinstance(around, list) else None:
            case [float() as low, float() as high]:
                return low, high
        deviation = finite(around) or 0.0
        return value - deviation, value + deviation


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: the config with dotted keys, everything that has a step in its order."""

    folder: RunFolder
    config: dict[str, object]
    environment: dict[object, object]
    log: list[dict[str, object]]
    evaluations: list[Evaluation]
    grids: list[tuple[int, Path]]
    chosen: dict[object, object]  # the best by run.keep_best on images that did not choose it; empty if there is none
    notes: list[str]  # what could not be read

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def step(self) -> int:
        """The newest step that left a trace."""
        logged = [int(step) for step in self.logged("step").values[-1:]]
        return max([*logged, *(item.step for item in self.evaluations), *(step for step, _ in self.grids)], default=0)

    @property
    def status(self) -> str:
        goal = finite(self.config.get("training.steps"))
        if goal is None:
            return f"step {self.step:,}"
        if self.step >= goal:
            return f"finished, {self.step:,} steps"
        if self.chosen.get("last_step") == self.step:
            return f"finished, step {self.step:,} of {goal:,.0f}: no better score came"
        return f"unfinished, step {self.step:,} of {goal:,.0f}"

    @property
    def differences(self) -> dict[str, tuple[object, object]]:
        """Dotted key -> (value, default) where they differ."""
        defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(Config()).items()}
        unknown = {key: "none" if key.startswith("network.options.") else "not in this version" for key in self.config}
        known = {key: (value, (unknown | defaults)[key]) for key, value in self.config.items()}
        return {key: pair for key, pair in known.items() if pair[0] != pair[1]}

    @property
    def sample_rows(self) -> list[str]:
        """Names of the classes in the rows of the grids; empty without classes, and in runs of earlier versions."""
        names = self.environment.get("sample_rows")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def latest(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    def newest(self, features: str) -> Evaluation | None:
        """The newest evaluation in these features."""
        return next((item for item in reversed(self.evaluations) if features in item.features), None)

    @property
    def features(self) -> list[str]:
        """Feature sets of all evaluations, the package's own first."""
        names = {name for item in self.evaluations for name in item.features}
        return sorted(names, key=lambda name: (name != "mnist", name))

    @property
    def best(self) -> dict[str, dict[str, float]]:
        """Feature set -> the lowest FID among those that compare with its newest, and that one's step."""
        curves = {name: curve for name in self.features if (curve := self.scored(name, "fid")).values}
        lowest = {name: min(zip(curve.values, curve.steps, strict=True)) for name, curve in curves.items()}
        return {name: {"fid": fid, "step": step} for name, (fid, step) in lowest.items()}

    @property
    def chosen_in_words(self) -> str:
        match self.chosen:
            case {"step": int() as step, "features": dict() as features, "chosen_by": dict() as by}:
                scores = {name: item.get("fid") for name, item in features.items() if isinstance(item, dict)}
                fids = [f"{name} FID {fid:.4g}" for name, value in scores.items() if (fid := finite(value)) is not None]
                how = f"Best of {by.get('evaluations')} evaluations by {by.get('score')}: step {step:,}"
                return f"{how}. On images that did not choose it: {', '.join(fids) or 'no FID'}."
        return ""

    @property
    def timing(self) -> dict[str, float | None]:
        """Training and evaluation are counted apart, both since the run began; waiting is a part of training."""
        training, evaluation = (self.logged(f"{name}_seconds").values[-1:] for name in ("elapsed", "evaluation"))
        waits, speeds = self.logged("data_wait_seconds").values, self.logged("images_per_second").values
        total = sum(training + evaluation)
        return {
            "total_seconds": total if training else None,
            "evaluation_share": sum(evaluation) / total if evaluation and total else None,
            "data_wait_share": min(1.0, sum(waits) / total) if waits and total else None,
            "images_per_second": statistics.median(speeds) if speeds else None,
        }

    def logged(self, key: str) -> Curve:
        """A column of the log of metrics."""
        return _curve((finite(line["step"]), finite(line.get(key))) for line in self.log)

    def of_critic(self, key: str) -> Curve:
        """A number of what evaluations found of their checkpoint's critic, among those of the newest's weights."""
        weights = self.latest.settings.get("weights") if self.latest else None
        alike = [item for item in self.evaluations if item.settings.get("weights") == weights]
        return _curve((float(item.step), finite(item.about("critic").get(key))) for item in alike)

    def scored(self, features: str, key: str, spread: str = "") -> Curve:
        """A score over the evaluations that compare with the newest, with a band where `spread` is given (see
        `Evaluation.band`)."""
        items, newest = self.evaluations, self.newest(features)
        compared = [item for item in items if newest and item.way(features, key) == newest.way(features, key)]
        kept = [(item, value) for item in compared if (value := item.score(features, key)) is not None]
        band = [item.band(features, value, spread) for item, value in kept] if spread else None
        return Curve([float(item.step) for item, _ in kept], [value for _, value in kept], band)


def _curve(points: Iterable[tuple[float | None, float | None]]) -> Curve:
    """Of the points that are known."""
    kept = [(step, value) for step, value in points if step is not None and value is not None]
    return Curve([step for step, _ in kept], [value for _, value in kept])


def is_run(path: Path) -> bool:
    """Whether anything in a folder belongs to a run."""
    folder = RunFolder(path)
    return any(part.exists() for part in (folder.config, folder.metrics, folder.evaluation, folder.samples))


def read_run(path: Path) -> Run:
    """What a report needs from a run's folder; anything damaged becomes a note.

    Raises:
        UserError: there is no such folder, or nothing in it belongs to a run.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the folder of a run, such as runs/wgan")
    folder, notes = RunFolder(path), list[str]()
    if not is_run(path):
        raise UserError(f"{path} is not a run: it has no config.yaml, metrics.jsonl, evaluation or samples")
    log = _read_log(folder.metrics, notes)
    return Run(
        folder,
        config=_dotted(_read_mapping(folder.config, read_yaml, notes)),
        environment=_read_mapping(folder.environment, parse_json, notes),
        log=log,
        evaluations=read_evaluations(folder, notes),
        grids=folder.grids(),
        chosen=_read_mapping(folder.best_scores, parse_json, notes),
        notes=notes,
    )


def read_evaluations(folder: RunFolder, notes: list[str]) -> list[Evaluation]:
    """All that can be read, in the order of their steps; the others are noted."""
    found = [item for scores in folder.all_scores() if (item := _read_evaluation(scores, notes))]
    return sorted(found, key=lambda item: item.step)


def _read_log(path: Path, notes: list[str]) -> list[dict[str, object]]:
    """The lines in the order of their steps. A resumed run repeats steps: the later line counts."""
    log: dict[float, dict[str, object]] = {}
    num_damaged = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = parse_json_text(text)
            log[float(line["step"])] = line
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            num_damaged += 1
    if num_damaged:
        notes.append(f"{path.name}: {num_damaged} damaged line(s); a killed run leaves one")
    return [log[step] for step in sorted(log)]


def _read_evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    match _read_mapping(path, parse_json, notes):
        case {"step": int() as step, "features": dict() as features, **settings} if finite(step) is not None:
            scores = {str(name): item for name, item in features.items() if isinstance(item, dict)}
            return Evaluation(step, {str(key): value for key, value in settings.items()}, scores)
    return None


def _read_mapping(path: Path, parse: Callable[[Path], object], notes: list[str]) -> dict[object, object]:
    """The mapping in a file; empty if there is no file, empty and noted if it is damaged."""
    try:
        content = parse(path) if path.exists() else {}
    except (OSError, ValueError, RecursionError, UserError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is damaged")
        return {}
    return content


def _dotted(nested: Mapping[object, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
