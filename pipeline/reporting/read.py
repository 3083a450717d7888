"""A run's folder as numbers, `read_run`, and numbers as text.

Nothing is computed again here, and no damaged file raises: what can't be read becomes a note of the run.
"""

import base64
import html
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, flatten, read_yaml
from pipeline.errors import UserError
from pipeline.storage.run_folder import RunFolder

OF_NEIGHBOURS = ("precision", "recall", "density", "coverage")
"""The scores that depend on a number k of nearest neighbours."""
USUAL_NEIGHBOURS = 5
"""The k of files of scores that do not name it."""
MISSING = "—"
FEW_IMAGES = 2_000

# -- numbers as text ---------------------------------------------------------------------------------------------------


def finite(value: object) -> float | None:
    """Returns the number, or None for what is not one or could not be drawn, as NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def number(value: object, digits: int = 3) -> str:
    """Returns a number with at least `digits` significant digits and commas between thousands."""
    known = finite(value)
    if known is None:
        return MISSING
    if known.is_integer() or abs(known) >= 10 ** (digits - 1):
        return f"{known:,.0f}"
    return f"{known:#.{digits}g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f}\u00a0s"
    return f"{seconds / 60:.0f}\u00a0min" if seconds < 5400 else f"{seconds / 3600:.1f}\u00a0h"


def percent(share: object) -> str:
    known = finite(share)
    return MISSING if known is None else f"{known:.1%}"


def setting(value: object) -> str:
    """Returns a setting on one line, as YAML would hold it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def code(text: str) -> str:
    """Returns Markdown that shows any text as it is."""
    return "`" + re.sub(r"[`\s]+", " ", text) + "`"


def few_images(num_images: object, num_real: int = FEW_IMAGES) -> str | None:
    """Returns a warning if so few images were scored, or compared with, that the scores mean little."""
    count = finite(num_images)
    if num_real < FEW_IMAGES and (count is None or count >= FEW_IMAGES):
        return (
            f"only {num_real:,} real images to compare with raise FID and its floor: compare it with FIDs of them alone"
        )
    if count is None or count >= FEW_IMAGES:
        return None
    return f"only {count:,.0f} images are scored: below {FEW_IMAGES:,} a FID tells more of their number than of them"


# -- what a folder holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Values over steps, as many as steps; `band` holds the [low, high] around each value."""

    steps: list[float]
    values: list[float]
    band: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Evaluation:
    """A file of scores: how the images were scored, and feature space -> score -> value."""

    step: int
    settings: dict[str, object]
    features: dict[str, dict[str, object]]

    def score(self, features: str, key: str) -> float | None:
        return finite(self.features.get(features, {}).get(key))

    def about(self, key: str) -> dict[str, object]:
        """Returns the values of "critic" or "gan_train", which need no feature space; empty if there are none."""
        return _mapping(self.settings.get(key))

    def images(self, features: str) -> dict[str, object]:
        """Returns metric -> number of images that it took."""
        return _mapping(self.features.get(features, {}).get("images"))

    def neighbours(self, features: str) -> object:
        """Returns the k of precision and similar scores."""
        return self._provenance(features).get("neighbours", USUAL_NEIGHBOURS)

    def conditions(self, features: str, key: str = "fid") -> dict[str, object]:
        """Returns how the images were scored. Two scores `key` compare if all of it is equal; datasets and extractors
        are given by their fingerprints."""
        settings = {key: self.settings.get(key) for key in ("num_images", "reference", "weights")}
        settings |= {key: self._provenance(features).get(key) for key in ("dataset", "extractor")}
        return settings | ({"neighbours": self.neighbours(features)} if key in OF_NEIGHBOURS else {})

    def band(self, features: str, value: float, spread: str) -> tuple[float, float]:
        """Returns the (low, high) around a score. The entry `spread` is either that or a standard deviation; if it is
        missing, the band has no width."""
        around = self.features[features].get(spread)
        match [finite(end) for end in around] if isinstance(around, list) else None:
            case [float() as low, float() as high]:
                return low, high
        deviation = finite(around) or 0.0
        return value - deviation, value + deviation

    def _provenance(self, features: str) -> dict[str, Any]:
        return _mapping(self.features.get(features, {}).get("provenance"))


@dataclass(frozen=True, repr=False)
class Run:
    """What a run's folder holds. Whatever has a step is in the order of steps. A notebook shows its newest samples."""

    folder: RunFolder
    config: dict[str, object]
    """The settings, by dotted keys."""
    environment: dict[str, Any]
    log: list[dict[str, object]]
    """The lines of the log of metrics."""
    evaluations: list[Evaluation]
    grids: list[tuple[int, Path]]
    chosen: dict[str, Any]
    """The scores, on images that did not choose it, of the best generator by run.keep_best; empty if there is none."""
    notes: list[str]
    """Messages about what could not be read."""

    def __repr__(self) -> str:
        return f"<Run {self.folder.path}: {'; '.join([self.status, *self.in_brief])}>"

    def _repr_html_(self) -> str:
        """Returns the newest grid of samples and a line about the run, for a notebook's output."""
        picture = ""
        if self.grids and self.grids[-1][1].is_file():
            image = base64.b64encode(self.grids[-1][1].read_bytes()).decode()
            picture = f'<img src="data:image/png;base64,{image}" alt="samples"><br>'
        return f"{picture}<code>{html.escape(repr(self)[1:-1])}</code>"

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def step(self) -> int:
        """The newest step of anything in the folder."""
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
        known = _mapping(self.environment.get("devices")) or {"core": None}
        return next((str(kind), finite(count)) for kind, count in known.items())

    @property
    def timing(self) -> dict[str, float | None]:
        """Times since the run began. Waiting for data is a part of training; evaluation is not. `device_seconds` is the
        whole time on as many cores or GPUs as the newest launch had."""
        training, evaluation = (self.logged(f"{name}_seconds").values[-1:] for name in ("elapsed", "evaluation"))
        waits, speeds = self.logged("data_wait_seconds").values, self.logged("images_per_second").values
        total = sum(training + evaluation)
        return {
            "total_seconds": total if training else None,
            "device_seconds": total * (self.devices[1] or 0.0) or None,
            "evaluation_share": sum(evaluation) / total if evaluation and total else None,
            "data_wait_share": min(1.0, sum(waits) / total) if waits and total else None,
            "images_per_second": statistics.median(speeds) if speeds else None,
        }

    def logged(self, key: str) -> Curve:
        """Returns a column of the log of metrics."""
        return _curve((finite(line["step"]), finite(line.get(key))) for line in self.log)

    # -- scores --------------------------------------------------------------------------------------------------------

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
        items, newest = self.evaluations, self.newest(features)
        alike = [
            item for item in items if newest and item.conditions(features, key) == newest.conditions(features, key)
        ]
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
    def chosen_in_words(self) -> str:
        """A sentence about `chosen`; empty if there is none."""
        match self.chosen:
            case {"step": int() as step, "features": dict() as features, "chosen_by": dict() as by}:
                scores = {name: item.get("fid") for name, item in features.items() if isinstance(item, dict)}
                fids = [f"{name} FID {fid:.4g}" for name, value in scores.items() if (fid := finite(value)) is not None]
                choice = f"Best of {by.get('evaluations')} evaluations by {by.get('score')}: step {step:,}"
                return f"{choice}. On images that did not choose it: {', '.join(fids) or 'no FID'}."
        return ""

    @property
    def in_brief(self) -> list[str]:
        """For each feature space the newest FID, its floor, and the best FID if that is another."""
        lines = []
        for features in self.features:
            newest, best = self.newest(features), self.best.get(features)
            if newest is not None and best is not None:
                fid, floor = (number(newest.score(features, key)) for key in ("fid", "fid_floor"))
                other = f", best {number(best['fid'])} at step {best['step']:.0f}" * (best["step"] != newest.step)
                lines.append(f"{features} FID {fid} (floor {floor}) at step {newest.step}{other}")
        return lines


def _curve(points: Iterable[tuple[float | None, float | None]]) -> Curve:
    known = [(step, value) for step, value in points if step is not None and value is not None]
    return Curve([step for step, _ in known], [value for _, value in known])


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# -- reading -----------------------------------------------------------------------------------------------------------


def is_run(path: Path) -> bool:
    """Tells whether anything in a folder belongs to a run."""
    folder = RunFolder(path)
    return any(part.exists() for part in (folder.config, folder.metrics, folder.evaluation, folder.samples))


def read_run(path: str | Path) -> Run:
    """Reads what a report needs from a run's folder.

    Raises:
        UserError: There is no such folder, or nothing in it belongs to a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the folder of a run, such as runs/wgan")
    folder, notes = RunFolder(path), list[str]()
    if not is_run(path):
        raise UserError(f"{path} is not a run: it has no config.yaml, metrics.jsonl, evaluation or samples")
    log = _read_log(folder.metrics, notes)
    return Run(
        folder,
        config=_dotted(_read_mapping(folder.config, notes, read_yaml)),
        environment=_read_mapping(folder.environment, notes),
        log=log,
        evaluations=read_evaluations(folder, notes),
        grids=folder.grids(),
        chosen=_read_mapping(folder.best_scores, notes),
        notes=notes,
    )


def read_evaluations(folder: RunFolder, notes: list[str]) -> list[Evaluation]:
    """Returns the evaluations that can be read, in the order of their steps, and adds a note for each other one."""
    evaluations = []
    for path in folder.all_scores():
        match _read_mapping(path, notes):
            case {"step": int() as step, "features": dict() as features, **settings} if finite(step) is not None:
                scores = {str(name): item for name, item in features.items() if isinstance(item, dict)}
                evaluations.append(Evaluation(step, settings, scores))
    return sorted(evaluations, key=lambda item: item.step)


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
        notes.append(f"{path.name}: {num_damaged} damaged line(s); a killed run leaves one")
    return [log[step] for step in sorted(log)]


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)  # NaN and infinities are missing values


def _read_mapping(path: Path, notes: list[str], read: Callable[[Path], object] | None = None) -> dict[str, Any]:
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


def _dotted(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
