"""A run's folder as numbers: `read_run`.

Nothing is computed again here, and no damaged file raises: what can't be read becomes a note of the run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, flatten, read_yaml
from pipeline.errors import UserError
from pipeline.reporting import LOGGED, SCORES, counted, few_images, finite, number
from pipeline.storage.run_folder import MANIFEST, RunFolder

if TYPE_CHECKING:
    import pandas

    from pipeline.reporting.charts import NotebookFigure

OF_NEIGHBOURS = ("precision", "recall", "density", "coverage")
"""The scores that depend on a number k of nearest neighbours."""
USUAL_NEIGHBOURS = 5
"""The k of files of scores that do not name it."""
OTHER_SPLIT = {"train": "test", "test": "train"}
"""The reference split of an evaluation -> the split whose images give the floors."""

_parse_json = partial(json.loads, parse_constant=lambda _: None)  # NaN and infinities are missing values


@dataclass(frozen=True)
class Curve:
    """Values over steps, as many as steps; `band` holds the [low, high] around each value."""

    steps: list[float]
    values: list[float]
    band: list[tuple[float, float]] | None = None


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A file of scores: how the images were scored, and feature space -> score -> value."""

    step: int
    settings: dict[str, object]
    features: dict[str, dict[str, object]]

    def __repr__(self) -> str:
        fids = (f"{features} FID {number(self.score(features, 'fid'))}" for features in self.features)
        return f"<Evaluation of step {self.step}: {', '.join(fids)}>"

    def score(self, features: str, key: str) -> float | None:
        """Returns a score; None if the evaluation lacks it. Raises UserError for a name that no score has."""
        if not {key, key.rpartition("_")[0]} & {*SCORES, *(name for item in self.features.values() for name in item)}:
            raise UserError(f"no score is called {key}: there are {', '.join(SCORES)}")
        return finite(self.features.get(features, {}).get(key))

    @property
    def scores(self) -> dict[str, float]:
        """The scores that are numbers, as SPACE/SCORE."""
        pairs = ((f"{name}/{key}", item[key]) for name, item in self.features.items() for key in item)
        return {name: known for name, value in pairs if (known := finite(value)) is not None}

    @property
    def warning(self) -> str:
        """A sentence about too few generated or real images; empty if there are enough."""
        return str(self.settings.get("warning") or few_images(self.settings.get("num_images")) or "")

    def about(self, key: str) -> dict[str, object]:
        """Returns the values of "critic", "gan_train" or "timing", which need no feature space; empty without them."""
        return _mapping(self.settings.get(key))

    def images(self, features: str) -> dict[str, object]:
        """Returns metric -> number of images that it took."""
        return _mapping(self.features.get(features, {}).get("images"))

    def provenance(self, features: str) -> dict[str, object]:
        """Returns what the scores were computed with: extractor, dataset and others."""
        return _mapping(self.features.get(features, {}).get("provenance"))

    def neighbours(self, features: str) -> object:
        """Returns the k of precision and similar scores."""
        return self.provenance(features).get("neighbours", USUAL_NEIGHBOURS)

    def floor(self, features: str, score: str = "fid") -> str:
        """Returns the floor of a score in words, or why there is none."""
        if (value := self.score(features, f"{score}_floor")) is not None:
            own = self.score(features, score)
            is_below = score == "mode_kl" and own is not None and own < value
            return f"{'below the ' * is_below}floor {number(value)}{': more even than real images' * is_below}"
        reason = "the dataset's classes are not those of the features" if score == "mode_kl" else "none was measured"
        if self.images(features).get("fid_floor", 0) is None:
            reason = f"the real images have no {OTHER_SPLIT.get(str(self.settings.get('reference')), 'other')} split"
        return f"no floor, because {reason}"

    def conditions(self, features: str, key: str = "fid") -> dict[str, object]:
        """Returns how the images were scored. Two scores `key` compare if all of it is equal; datasets and extractors
        are given by their fingerprints."""
        settings = {key: self.settings.get(key) for key in ("num_images", "reference", "weights")}
        settings |= {key: self.provenance(features).get(key) for key in ("dataset", "extractor")}
        return settings | ({"neighbours": self.neighbours(features)} if key in OF_NEIGHBOURS else {})

    def band(self, features: str, value: float, spread: str) -> tuple[float, float]:
        """Returns the (low, high) around a score. The entry `spread` is either that or a standard deviation; if it is
        missing, the band has no width."""
        around = self.features[features].get(spread)
        match [finite(end) for end in around] if isinstance(around, list) else None:
            case [float() as low, float() as high]:
                return max(low, 0.0), high  # of FID and the KL of modes, which are not negative
        deviation = finite(around) or 0.0
        return value - deviation, value + deviation


@dataclass(frozen=True, repr=False)
class Run:
    """What a run's folder holds, in the order of steps. A notebook shows its newest samples and its curves."""

    folder: RunFolder
    config: dict[str, object]
    """The settings, by dotted keys."""
    environment: dict[str, object]
    log: list[dict[str, object]]
    """The lines of the log of metrics."""
    evaluations: list[Evaluation]
    grids: list[tuple[int, Path]]
    checkpoints: list[int]
    """The steps that are saved."""
    progress: dict[str, object]
    """What the newest checkpoint says beside its tensors."""
    chosen: dict[str, object]
    """The scores, on images that did not choose it, of the best generator by run.keep_best; empty if there is none."""
    notes: list[str]
    """Messages about what could not be read."""

    def __repr__(self) -> str:
        return f"<Run {self.folder.path}: {'; '.join([self.status, *self.in_brief])}>"

    def _repr_html_(self) -> str:
        """Returns the newest samples, curves and a line about the run, for a notebook's output."""
        from pipeline.reporting.charts import notebook_html

        return notebook_html(self)

    def plot(self) -> NotebookFigure:
        """Draws the losses, and the FIDs of each feature space, over the steps."""
        from pipeline.reporting.charts import plot

        losses = {name: self.logged(f"{name}_loss") for name in ("critic", "generator")}
        return plot(
            {"Losses": losses, "FID": {name: self.scored(name, "fid", "fid_interval") for name in self.features}}
        )

    def dataframe(self) -> pandas.DataFrame:
        """Returns the log's columns, and scores as `SPACE/SCORE`, by step; NaN where a step has none.

        Raises:
            UserError: pandas is missing.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("a run's dataframe() needs pandas: pip install 'gan-pipeline[notebook]'") from None
        rows: dict[int, dict[str, float | None]] = {}
        scores: list[dict[str, object]] = [{"step": item.step, **item.scores} for item in self.evaluations]
        for line in self.log + scores:
            if (step := finite(line["step"])) is not None:
                rows.setdefault(int(step), {}).update({key: finite(line[key]) for key in line if key != "step"})
        return pandas.DataFrame(list(rows.values()), pandas.Index(rows, dtype=int, name="step")).sort_index()

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def step(self) -> int:
        """The newest step of anything in the folder: after an interrupt the saved one."""
        scored, drawn = (item.step for item in self.evaluations), (step for step, _ in self.grids)
        return max([*map(int, self.logged("step").values), *scored, *drawn, *self.checkpoints], default=0)

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
        """Dotted key -> (value, default) of the settings that are not the defaults."""
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
    def devices(self) -> tuple[str, float | None]:
        """What the newest launch computed on, GPU or core, and how many, if that is known."""
        kind, count = next(iter(_mapping(self.environment.get("devices")).items()), ("core", None))
        return str(kind), finite(count)

    @property
    def timing(self) -> dict[str, float | None]:
        """Times up to the newest checkpoint, line of the log or evaluation. Waiting for data is a part of training,
        evaluation is not. `device_seconds` is the whole time on as many cores or GPUs as the newest launch had."""
        training, evaluation = (
            max([*self.logged(key).values[-1:], finite(self.progress.get(key)) or 0.0])
            for key in ("elapsed_seconds", "evaluation_seconds")
        )
        # The last one ends after the log's last line and the checkpoint of its step.
        evaluation = max(evaluation, sum(finite(item.about("timing").get("seconds")) or 0 for item in self.evaluations))
        waits, speeds = self.logged("data_wait_seconds").values, self.logged("images_per_second").values
        total = training + evaluation
        return {
            "total_seconds": total or None,
            "device_seconds": total * (self.devices[1] or 0.0) or None,
            "evaluation_share": evaluation / total if total else None,
            "data_wait_share": min(1.0, sum(waits) / total) if waits and total else None,
            "images_per_second": statistics.median(speeds) if speeds else None,
        }

    def logged(self, key: str) -> Curve:
        """Returns a column of the log of metrics. Raises UserError for one that is neither in LOGGED nor in the log."""
        if key not in LOGGED and not any(key in line for line in self.log):
            raise UserError(f"no column of the log is called {key}: there are {', '.join(LOGGED)}")
        return _curve((finite(line["step"]), finite(line.get(key))) for line in self.log)

    @property
    def features(self) -> list[str]:
        """The feature spaces of all evaluations, this package's first."""
        names = {name for item in self.evaluations for name in item.features}
        return sorted(names, key=lambda name: (name != "mnist", name))

    @property
    def latest(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    def newest(self, features: str) -> Evaluation | None:
        """Returns the newest evaluation in this feature space."""
        return next((item for item in reversed(self.evaluations) if features in item.features), None)

    def scored(self, features: str, key: str, spread: str = "") -> Curve:
        """Returns a score over the evaluations that compare with the newest, with a band if `spread` is given (see
        `Evaluation.band`)."""
        usual = newest.conditions(features, key) if (newest := self.newest(features)) else None
        alike = [item for item in self.evaluations if item.conditions(features, key) == usual]
        known = [(item, value) for item in alike if (value := item.score(features, key)) is not None]
        band = [item.band(features, value, spread) for item, value in known] if spread else None
        return Curve([float(item.step) for item, _ in known], [value for _, value in known], band)

    def of_critic(self, key: str) -> Curve:
        """Returns a score of the critics over the evaluations of the same kind of weights as the newest."""
        weights = self.latest.settings.get("weights") if self.latest else None
        alike = [item for item in self.evaluations if item.settings.get("weights") == weights]
        return _curve((float(item.step), finite(item.about("critic").get(key))) for item in alike)

    @property
    def best(self) -> dict[str, dict[str, float]]:
        """Feature space -> the lowest FID among those that compare with its newest, and the step of that."""
        curves = {name: curve for name in self.features if (curve := self.scored(name, "fid")).values}
        lowest = {name: min(zip(curve.values, curve.steps, strict=True)) for name, curve in curves.items()}
        return {name: {"fid": fid, "step": step} for name, (fid, step) in lowest.items()}

    @property
    def in_brief(self) -> list[str]:
        """For each feature space the newest FID, its floor, and the best FID if that is another."""
        lines = []
        for name, best in self.best.items():
            [*_, newest] = (item for item in self.evaluations if name in item.features)
            line = f"{name} FID {number(newest.score(name, 'fid'))} ({newest.floor(name)}) at step {newest.step}"
            other = f", best {number(best['fid'])} at step {best['step']:.0f}"
            lines.append(line + other * (best["step"] != newest.step))
        return lines


def _curve(points: Iterable[tuple[float | None, float | None]]) -> Curve:
    known = [(step, value) for step, value in points if step is not None and value is not None]
    return Curve([step for step, _ in known], [value for _, value in known])


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def is_run(path: Path) -> bool:
    """Tells whether anything in a folder belongs to a run."""
    folder = RunFolder(path)
    return folder.config.exists() or folder.metrics.exists() or bool(folder.grids() or folder.all_scores())


def read_run(path: str | Path) -> Run:
    """Reads what a report needs from a run's folder.

    Raises:
        UserError: There is no such folder, or nothing in it belongs to a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the folder of a run, such as runs/wgan")
    if not is_run(path):
        raise UserError(f"{path} is not a run: it has no config.yaml, metrics.jsonl, evaluation or samples")
    folder, notes = RunFolder(path), list[str]()
    manifest = folder.checkpoint(max(folder.saved_steps(), default=0)) / MANIFEST
    return Run(
        folder,
        config=_dotted(read_mapping(folder.config, notes, read_yaml)),
        environment=read_mapping(folder.environment, notes),
        log=_read_log(folder.metrics, notes),
        evaluations=read_evaluations(folder, notes),
        grids=folder.grids(),
        checkpoints=folder.saved_steps(),
        progress=_mapping(read_mapping(manifest, notes).get("progress")),
        chosen=read_mapping(folder.best_scores, notes),
        notes=notes,
    )


def read_evaluations(folder: RunFolder, notes: list[str]) -> list[Evaluation]:
    """Returns the evaluations that can be read, in the order of their steps, and adds a note for each other one."""
    items = (read_evaluation(path, notes) for path in folder.all_scores())
    return sorted((item for item in items if item), key=lambda item: item.step)


def read_evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    """Returns the evaluation in a file; None, and a note, if it can't be read."""
    match read_mapping(path, notes):
        case {"step": int() as step, "features": dict() as features, **settings} if finite(step) is not None:
            scores = {str(name): item for name, item in features.items() if isinstance(item, dict)}
            return Evaluation(step, settings, scores)
    return None


def _read_log(path: Path, notes: list[str]) -> list[dict[str, object]]:
    """Returns the lines in the order of their steps. A resumed run repeats steps: the later line counts."""
    log: dict[float, dict[str, object]] = {}
    num_damaged = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = _parse_json(text)
            log[float(line["step"])] = line
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            num_damaged += 1
    if num_damaged:
        notes.append(f"{path.name}: {counted(num_damaged, 'damaged line')}; a killed run leaves one")
    return [log[step] for step in sorted(log)]


def read_mapping(path: Path, notes: list[str], read: Callable[[Path], object] | None = None) -> dict[str, Any]:
    """Returns the mapping in a file, JSON unless `read` is given; it is empty without a file, or if that is damaged,
    which is noted."""
    try:
        content = (read(path) if read else _parse_json(path.read_text("utf-8"))) if path.exists() else {}
    except (OSError, ValueError, RecursionError, UserError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is damaged")
        return {}
    return content


def _dotted(sections: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in sections.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
