"""A run's folder -> report.html, report.md and report.json; several runs -> one page that compares them.

Only files are read (no torch, nothing is computed again), whatever part of a run is missing is left out, and the same
folder gives the same bytes. The pages need nothing but themselves: styles, charts and images are inside them.
"""

import argparse
import base64
import functools
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from PIL import Image

from pipeline.config import Config, flatten
from pipeline.errors import UserError
from pipeline.storage.files import replacing

MAX_GRIDS = 40
MAX_POINTS = 400  # per drawn line: more cannot be seen at the width of a chart and only costs bytes
IMAGE_BYTES = 1_500_000  # of all images of a page, before base64 adds a third: keeps the page under 3 MB
MISSING = "—"
# Colours given to matplotlib only to be found again and replaced by the page's own, which follow dark mode.
INK, RULE, LINES = "#010101", "#020202", tuple(f"#03000{i}" for i in range(6))


@dataclass(frozen=True)
class Evaluation:
    """One evaluation/step-*.json: how images were scored, and feature set -> score -> value."""

    step: int
    settings: dict[str, object]
    features: dict[str, dict[str, object]]

    def score(self, features: str, key: str) -> float | None:
        return _finite(self.features.get(features, {}).get(key))


@dataclass(frozen=True)
class Line:
    """One curve over steps: with a band around it, or smoothed over its faint raw values."""

    label: str
    steps: list[float]
    values: list[float]
    band: list[tuple[float, float]] | None = None
    smooth: bool = False
    letter: str = ""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: the config with dotted keys, everything that has a step in its order."""

    folder: Path
    config: dict[str, object]
    environment: dict[object, object]
    log: list[dict[str, object]]
    evaluations: list[Evaluation]
    grids: list[tuple[int, Path]]
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def latest(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def features(self) -> list[str]:
        """Feature sets of all evaluations, the package's own first."""
        return sorted({name for item in self.evaluations for name in item.features}, key=lambda name: name != "mnist")

    @property
    def step(self) -> int:
        logged = [int(step) for step in self.logged("step").values[-1:]]
        return max([*logged, *(item.step for item in self.evaluations), *(step for step, _ in self.grids)], default=0)

    @property
    def status(self) -> str:
        goal = _finite(self.config.get("training.steps"))
        if goal is None:
            return f"step {self.step:,}"
        return (
            f"finished, {self.step:,} steps" if self.step >= goal else f"unfinished, step {self.step:,} of {goal:,.0f}"
        )

    @property
    def differences(self) -> dict[str, tuple[object, object]]:
        """Dotted key -> (value, default) where they differ."""
        defaults = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(Config()).items()}
        known = {key: (value, defaults.get(key, "not in this version")) for key, value in self.config.items()}
        return {key: pair for key, pair in known.items() if pair[0] != pair[1]}

    @property
    def best(self) -> dict[str, dict[str, float]]:
        """Feature set -> its lowest FID and that one's step."""
        curves = {name: self.scored(name, "fid") for name in self.features}
        pairs = {name: min(zip(line.values, line.steps, strict=True), default=None) for name, line in curves.items()}
        return {name: {"fid": pair[0], "step": pair[1]} for name, pair in pairs.items() if pair}

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
            "images_per_second": float(np.median(speeds)) if speeds else None,
        }

    def logged(self, key: str, label: str = "") -> Line:
        """A column of metrics.jsonl."""
        pairs = [(_finite(line["step"]), _finite(line.get(key))) for line in self.log]
        kept = [(step, value) for step, value in pairs if step is not None and value is not None]
        return Line(label or key, [step for step, _ in kept], [value for _, value in kept], smooth=True)

    def scored(self, features: str, key: str, spread: str = "", label: str = "", letter: str = "") -> Line:
        """A score over the evaluations; `spread` names its [low, high] or its standard deviation."""
        kept = [(item, value) for item in self.evaluations if (value := item.score(features, key)) is not None]
        band = []
        for item, value in kept:
            match item.features[features].get(spread):
                case [int() | float() as low, int() | float() as high]:
                    band.append((float(low), float(high)))
                case other:
                    deviation = _finite(other) or 0.0
                    band.append((value - deviation, value + deviation))
        steps = [float(item.step) for item, _ in kept]
        return Line(label or key, steps, [value for _, value in kept], band if spread else None, letter=letter)

    def last(self, pattern: str) -> Path | None:
        return max(self.folder.glob(pattern), default=None, key=lambda path: (len(path.name), path.name))

    def image(self, path: Path | None, max_bytes: int) -> tuple[str, bool] | None:
        """See `data_uri`; None where there is no image, or a damaged one, which is noted."""
        if path is None:
            return None
        try:
            return data_uri(path, max_bytes)
        except (OSError, ValueError, SyntaxError):  # Pillow raises any of them for a damaged file
            self.notes.append(f"{path.name} is damaged")
            return None


def _finite(value: object) -> float | None:
    """The number, or None for what is not one or could not be drawn: NaN, infinity and their like."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def _dotted(nested: Mapping[object, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


_parse_json = functools.partial(json.loads, parse_constant=lambda _: None)  # NaN and infinities are missing values


def _load(path: Path, parse: Callable[[str], object], notes: list[str]) -> dict[object, object]:
    """The mapping in a file; empty if there is no file, empty and noted if it is damaged."""
    try:
        content = parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is damaged")
        return {}
    return content


def read_run(folder: Path) -> Run:
    """What a report needs from a run's folder; anything damaged becomes a note.

    Raises:
        UserError: there is no such folder, or nothing in it belongs to a run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a run, such as runs/wgan")
    if not any((folder / part).exists() for part in ("config.yaml", "metrics.jsonl", "evaluation", "samples")):
        raise UserError(f"{folder} is not a run: it has no config.yaml, metrics.jsonl, evaluation or samples")
    notes: list[str] = []
    log: dict[float, dict[str, object]] = {}
    metrics, num_damaged = folder / "metrics.jsonl", 0
    for text in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []:
        try:
            line = _parse_json(text)
            log[float(line["step"])] = line  # a resumed run repeats steps: the later line counts
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            num_damaged += 1
    if num_damaged:
        notes.append(f"{metrics.name}: {num_damaged} damaged line(s); a killed run leaves one")
    evaluations = []
    for path in folder.glob("evaluation/step-*.json"):
        match _load(path, _parse_json, notes):
            case {"step": int() as step, "features": dict() as features, **settings}:
                scores = {str(name): item for name, item in features.items() if isinstance(item, dict)}
                evaluations.append(Evaluation(step, {str(key): value for key, value in settings.items()}, scores))
    return Run(
        folder,
        config=_dotted(_load(folder / "config.yaml", yaml.safe_load, notes)),
        environment=_load(folder / "environment.json", _parse_json, notes),
        log=[log[step] for step in sorted(log)],
        evaluations=sorted(evaluations, key=lambda item: item.step),
        grids=sorted((int(path.stem), path) for path in folder.glob("samples/*.png") if path.stem.isdecimal()),
        notes=notes,
    )


def number(value: object, digits: int = 3) -> str:
    """At least `digits` significant digits, thousands apart."""
    finite = _finite(value)
    if finite is None:
        return MISSING
    if finite.is_integer() or abs(finite) >= 10 ** (digits - 1):
        return f"{finite:,.0f}"
    return f"{finite:#.{digits}g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.1%}"


def shown(value: object) -> str:
    """A setting on one line, as YAML would hold it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def verdict(evaluation: Evaluation, features: str) -> str:
    """What the FID means beside its floor, in a sentence. The words' bounds are a reading aid, not a test."""
    fid, floor = evaluation.score(features, "fid"), evaluation.score(features, "fid_floor")
    if fid is None:
        return "This evaluation measured no FID."
    if not floor:
        return "No floor was measured: the number only ranks runs that were scored in the same way."
    bounds = {1.5: "hardly any gap", 5: "a small gap", 25: "a clear gap", math.inf: "a wide gap"}
    gap = next(words for bound, words in bounds.items() if fid / floor <= bound)
    reference = str(evaluation.settings.get("reference"))
    other = {"train": "test", "test": "train"}.get(reference)
    real = f"real {other} images score against the same real {reference} images" if other else "other real images score"
    return (
        f"That is {number(fid / floor, 2)} times the floor of {number(floor)}, which {real}: "
        f"{gap} between generated and real images."
    )


def _axes(salt: str) -> tuple[Figure, Axes]:
    """A bare chart; call inside `rc_context`. The salt keeps the ids of charts on one page apart."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False})
    figure = Figure(figsize=(4.7, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    return figure, axes


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as inline SVG in the page's colours and fonts. Matplotlib escapes what text it is given."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", buffer.getvalue())
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    for placeholder, name in (
        (INK, "ink-soft"),
        (RULE, "rule"),
        *((line, f"line-{i}") for i, line in enumerate(LINES)),
    ):
        svg = svg.replace(placeholder, f"var(--{name})")
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}">'
    return Markup(head) + Markup(re.sub(r"(?s)^.*?<svg [^>]*>", "", svg, count=1))


def line_chart(title: str, lines: Sequence[Line], floor: float | None = None) -> Markup | None:
    """Curves over steps, on a log scale where they span more than a factor 20; None when there is nothing to draw."""
    lines = [line for line in lines if line.values]
    if not lines:
        return None
    with matplotlib.rc_context():
        figure, axes = _axes(title)
        for i, line in enumerate(lines):
            steps, values = np.array(line.steps), np.array(line.values)
            kept = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).astype(int))
            colour, dashes = LINES[i % len(LINES)], ("-", "--", ":", "-.")[i // len(LINES) % 4]
            window = np.ones(max(1, len(values) // 40 if line.smooth else 1))
            if len(window) > 1:
                axes.plot(steps[kept], values[kept], color=colour, alpha=0.3, linewidth=0.8)
                values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
            marker = "o" if len(steps) < 30 else ""
            axes.plot(steps[kept], values[kept], dashes, color=colour, linewidth=1.7, marker=marker, markersize=3)
            if line.band:
                axes.fill_between(steps, *np.array(line.band).T, color=colour, alpha=0.2, linewidth=0)
            end = (steps[-1], values[-1])
            axes.annotate(
                line.letter, end, (4, -3), textcoords="offset points", color=colour, fontsize=9, weight="bold"
            )
        if floor:
            axes.axhline(floor, color=INK, linewidth=1, linestyle="--")
        drawn = [value for line in lines for value in line.values] + ([floor] if floor else [])
        log = min(drawn) > 0 and max(drawn) > 20 * min(drawn)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(plain := ScalarFormatter(useOffset=False))
            plain.set_scientific(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step (vertical axis: log)" if log else "step", color=INK, fontsize=9)
        ends = [
            f"{line.label} from {number(line.values[0])} at step {number(line.steps[0])} to {number(line.values[-1])} "
            f"at step {number(line.steps[-1])}"
            for line in lines
        ]
        return _svg(figure, f"{title} over steps: {'; '.join(ends)}")


def bar_chart(title: str, values: object, levels: object = None) -> Markup | None:
    """One bar for each entry of a mapping, a mark across it at its entry of `levels`; None when there is no bar."""
    bars = values if isinstance(values, dict) else dict(enumerate(values)) if isinstance(values, list) else {}
    heights = {name: height for name, value in bars.items() if (height := _finite(value)) is not None}
    if not heights:
        return None
    with matplotlib.rc_context():
        figure, axes = _axes(title)
        axes.bar(range(len(heights)), list(heights.values()), color=LINES[0], width=0.72)
        marks = [(x, levels[name]) for x, name in enumerate(heights) if isinstance(levels, dict) and name in levels]
        for x, level in marks:
            axes.plot((x - 0.44, x + 0.44), (level, level), color=INK, linewidth=1.6)
        labels = [re.sub(r"[^ -~]", "?", str(name))[:12] for name in heights]  # what the font that measures them has
        if len(labels) <= 30:
            axes.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) <= 3 else 90)
        axes.set_xlabel("class", color=INK, fontsize=9)
        return _svg(figure, f"{title}: {', '.join(f'{name} {number(value)}' for name, value in heights.items())}")


def data_uri(path: Path, max_bytes: int) -> tuple[str, bool]:
    """The image as a data URI of at most `max_bytes` before base64, and whether it has so few pixels that they show.

    Lossless if that fits, else WebP, halved until it fits (but for images of 16 pixels).
    Raises:
        OSError, ValueError, SyntaxError: it is not an image, or a damaged one.
    """
    with Image.open(path) as source:
        image = source.convert("L" if source.mode in ("1", "L") else "RGB")
    few_pixels, kind, buffer = image.width <= 400, "png", io.BytesIO()
    image.save(buffer, kind, optimize=True)
    while buffer.tell() > max_bytes and min(image.size) > 16:
        image = image.reduce(2) if kind == "webp" else image
        kind, buffer = "webp", io.BytesIO()
        image.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", few_pixels


def _render(**context: object) -> str:
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters |= {"number": number, "duration": duration, "percent": percent, "shown": shown}
    jinja.globals |= {"line_chart": line_chart, "bar_chart": bar_chart, "verdict": verdict, "MISSING": MISSING}
    return jinja.get_template("report.html.jinja").render(context)


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _summary(run: Run) -> dict[str, object]:
    latest = run.latest
    return {
        "run": run.name,
        "status": run.status,
        "step": run.step,
        "verdict": {name: verdict(latest, name) for name in latest.features} if latest else {},
        "evaluation": {"step": latest.step, **latest.settings, "features": latest.features} if latest else None,
        "best": run.best,
        "last_logged": run.log[-1] if run.log else None,
        "timing": run.timing,
        "differences": {key: {"value": value, "default": default} for key, (value, default) in run.differences.items()},
        "environment": run.environment,
        "notes": run.notes,
    }


def _markdown(run: Run) -> str:
    def code(text: str) -> str:
        return "`" + re.sub(r"[`\s]+", " ", text) + "`"

    lines = [f"# {code(run.name)}: {run.status}", ""]
    for latest in run.evaluations[-1:]:
        for name, scores in latest.features.items():
            fid, mean, deviation, kid = (number(scores.get(key)) for key in ("fid", "is_mean", "is_std", "kid_mean"))
            images = number(latest.settings.get("num_images"))
            lines.append(
                f"- **FID {fid}** ({code(name)}, step {latest.step:,}, {images} images). {verdict(latest, name)}"
            )
            lines.append(f"- Inception score {mean} (standard deviation {deviation}), KID {kid}")
    timing, changed = run.timing, [code(f"{key}={shown(pair[0])}") for key, pair in run.differences.items()]
    lines += [
        f"- {number(timing['images_per_second'])} images/s; {duration(timing['total_seconds'])} in all: "
        f"evaluation {percent(timing['evaluation_share'])}, waiting for data {percent(timing['data_wait_share'])}",
        f"- not the defaults: {', '.join(changed) or 'nothing'}",
        *(f"- left out: {code(note)}" for note in run.notes),
    ]
    return "\n".join(lines) + "\n"


def write_report(run: Path) -> Path:
    """Write report.html, report.md and report.json into the run's folder.

    Returns:
        The path of report.html.
    Raises:
        UserError: not a run's folder, or it cannot be written to.
    """
    content = read_run(run)
    kept = np.unique(np.linspace(0, len(content.grids) - 1, min(len(content.grids), MAX_GRIDS)).round().astype(int))
    share = IMAGE_BYTES // (len(kept) + 10)  # five each for the interpolation and the neighbours
    frames = [(step, content.image(path, share)) for step, path in (content.grids[i] for i in kept)]
    page = _render(run=content, frames=[frame for frame in frames if frame[1]], single_image_bytes=5 * share)
    _write(run / "report.json", json.dumps(_summary(content), indent=2, default=str) + "\n")
    _write(run / "report.md", _markdown(content))
    _write(run / "report.html", page)
    return run / "report.html"


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Write one page with runs side by side: scores, newest grids, scores over steps, settings that differ.

    Returns:
        `out`.
    Raises:
        UserError: one of `runs` is not a run's folder, or `out` cannot be written.
    """
    contents = [read_run(run) for run in runs]
    names = [name for content in contents for name in content.features]
    features = max(names, key=names.count, default="")
    fids = [content.latest.score(features, "fid") if content.latest else None for content in contents]
    scored_in = [
        {content.latest and shown(content.latest.settings.get(key)) for content in contents} - {None}
        for key in ("num_images", "reference", "weights")
    ]
    keys = dict.fromkeys(key for content in contents for key in content.config if key != "run.name")
    settings = {key: [shown(content.config.get(key, MISSING)) for content in contents] for key in keys}
    page = _render(
        runs={chr(ord("A") + i % 26) + str(i // 26 or ""): content for i, content in enumerate(contents)},
        features=features,
        best_fid=min((fid for fid in fids if fid is not None), default=None),
        comparable=all(len(ways) <= 1 for ways in scored_in),
        settings={key: values for key, values in settings.items() if len(set(values)) > 1},
        single_image_bytes=IMAGE_BYTES // len(contents),
    )
    _write(out, page)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report on a run, or compare several on one page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/wgan")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page that compares the runs (comparison.html)")
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) == 1 and not options.out:
            print(write_report(options.runs[0]))
        else:
            print(compare(options.runs, options.out or Path("comparison.html")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
