"""Reports of runs: report.html, report.md and report.json of one, or one HTML page that compares several.

Parts that a run does not have are left out, and the same folder gives the same bytes. Styles, charts and images are
inside the pages, which need no other file. Their text is in the templates beside this file; sentences that a run's
HTML and Markdown share are functions at the end of this one.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image, ImageDraw, ImageOps

from pipeline.errors import UserError
from pipeline.reporting import SCORES, code, counted, duration, finite, number, percent, setting
from pipeline.reporting.charts import bar_chart, line_chart
from pipeline.reporting.comparison import Comparison, rank_runs
from pipeline.reporting.read import OTHER_SPLIT, Evaluation, Run, read_run
from pipeline.storage.files import replacing

MAX_GRIDS = 11
"""The grids that show the training: the first, one for each tenth of it, the last."""
IMAGE_BYTES = 1_500_000
"""The size of all images of a page before base64 adds a third: it keeps a page under 3 MB."""


def write_report(run: Path) -> Path:
    """Writes report.html, report.md and report.json into the run's folder and returns the path of the first.

    Raises:
        UserError: It is not a run's folder, or it can't be written to.
    """
    content = read_run(run)
    folder, grids, notes = content.folder, content.grids, content.notes
    num_shown = min(len(grids), MAX_GRIDS)
    shown = [grids[round(i * (len(grids) - 1) / max(1, num_shown - 1))] for i in range(num_shown)]
    # Neighbours and interpolation take five shares each; the last grid is there twice, and there are real images.
    share = IMAGE_BYTES // (num_shown + 12)
    page = _render(
        "html",
        run=content,
        frames=[(step, image) for step, path in shown if (image := data_uri(path, share, notes))],
        real=data_uri(folder.real_images(), share, notes),
        neighbours=data_uri(folder.newest_neighbours(), 5 * share, notes),
        interpolation=data_uri(folder.newest_interpolation(), 5 * share, notes),
    )
    _write(folder.report("json"), json.dumps(_summary(content), indent=2, default=str) + "\n")
    _write(folder.report("md"), _render("md", run=content))
    _write(folder.report("html"), page)
    return folder.report("html")


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Writes one page with runs side by side to `out` and returns it: scores and costs (seeds of one configuration by
    median and spread), newest grids, settings that differ. Beside it are its numbers (.csv, .json), a Markdown table
    (.md) and a picture of one grid of each configuration (.png).

    A best run is named among at least two that were scored in the same way; for the others the page says what differs.

    Raises:
        UserError: One of `runs` is not a run's folder, or `out` can't be written.
    """
    comparison = rank_runs([read_run(run) for run in runs])
    newest = {
        letter: (step, image)
        for letter, run in comparison.runs.items()
        for step, path in run.grids[-1:]
        if (image := data_uri(path, IMAGE_BYTES // len(runs), run.notes))
    }
    _write(out, _render("html", runs=comparison.runs, comparison=comparison, newest=newest))
    _write(out.with_suffix(".csv"), comparison.to_csv())
    _write(out.with_suffix(".json"), comparison.to_json())
    _write(out.with_suffix(".md"), comparison.to_markdown())
    if (picture := _picture(comparison)) is not None:
        _write(out.with_suffix(".png"), picture)
    return out


def _picture(comparison: Comparison) -> Image.Image | None:
    """Returns the newest grid of a run of each configuration, the one with the median FID, four in a row."""
    runs = {name: comparison.runs[letters[len(letters) // 2]] for name, letters in comparison.configurations}
    grids = {name: grid for name, run in runs.items() for _, file in run.grids[-1:] if (grid := _load(file, []))}
    if not grids:
        return None
    sheet = Image.new("RGB", (min(4, len(grids)) * 312 + 8, -(-len(grids) // 4) * 336 + 8), "white")
    for index, (name, grid) in enumerate(grids.items()):
        left, top = index % 4 * 312 + 8, index // 4 * 336 + 8
        ImageDraw.Draw(sheet).text((left, top), name, "black", font_size=18)
        sheet.paste(ImageOps.contain(grid, (304, 304)), (left, top + 24))
    return sheet


def data_uri(path: Path | None, max_bytes: int, notes: list[str]) -> tuple[str, bool] | None:
    """Returns the image as a data URI, and whether it is so small that the browser should show its pixels as squares.

    The image takes at most `max_bytes` before base64: it is lossless if it fits, else WebP, halved until it fits (but
    not below 16 pixels). The result is None if there is no image, or a damaged one, which is noted.
    """
    image = _load(path, notes)
    if image is None:
        return None
    is_small, kind, buffer = image.width <= 400, "png", io.BytesIO()
    image.save(buffer, kind, optimize=True)
    while buffer.tell() > max_bytes and min(image.size) > 16:
        image = image.reduce(2) if kind == "webp" else image
        kind, buffer = "webp", io.BytesIO()
        image.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_small


def _load(path: Path | None, notes: list[str]) -> Image.Image | None:
    """Returns the image in a file; None if there is none, or a damaged one, which is noted."""
    if path is None:
        return None
    try:
        with Image.open(path) as source:
            return source.convert("L" if source.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow raises any of them for a damaged file
        notes.append(f"{path.name} is damaged")
        return None


def _summary(run: Run) -> dict[str, object]:
    """Returns the content of report.json."""
    latest = run.latest
    return {
        "run": run.name,
        "status": run.status,
        "step": run.step,
        "verdict": {name: verdict(latest, name) for name in latest.features} if latest else {},
        "warning": (latest.warning or None) if latest else None,
        "evaluation": {"step": latest.step, **latest.settings, "features": latest.features} if latest else None,
        "best": run.best,
        "chosen": run.chosen or None,
        "last_logged": run.log[-1] if run.log else None,
        "timing": run.timing,
        "differences": {key: {"value": value, "default": default} for key, (value, default) in run.differences.items()},
        "environment": run.environment,
        "notes": run.notes,
    }


@cache
def _templates() -> Environment:
    loader, escaped = FileSystemLoader(Path(__file__).parent), select_autoescape(["html.jinja"])
    jinja = Environment(loader=loader, autoescape=escaped, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {function.__name__: function for function in (number, percent, duration, setting, code, counted)}
    jinja.globals |= {function.__name__: function for function in (line_chart, bar_chart, verdict, choice)}
    jinja.globals["SCORES"] = SCORES
    return jinja


def _render(kind: str, **context: object) -> str:
    return _templates().get_template(f"page.{kind}.jinja").render(context)


def _write(path: Path, content: str | Image.Image) -> None:
    try:
        with replacing(path) as temporary:
            if isinstance(content, str):
                temporary.write_bytes(content.encode("utf-8", "replace"))
            else:
                content.save(temporary, "png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# -- sentences ---------------------------------------------------------------------------------------------------------


def verdict(evaluation: Evaluation, features: str) -> str:
    """Returns sentences about what the FID means beside its floor. Their bounds help the reader; they are no test."""
    fid, floor = evaluation.score(features, "fid"), evaluation.score(features, "fid_floor")
    if fid is None:
        return "This evaluation measured no FID."
    if not floor:
        reason = evaluation.floor(features).capitalize()
        return f"{reason}: the number only ranks runs that were scored in the same way."
    bounds = {1.5: "hardly any gap", 5: "a small gap", 25: "a clear gap", math.inf: "a wide gap"}
    gap = next(words for bound, words in bounds.items() if fid / floor <= bound)
    reference = str(evaluation.settings.get("reference"))
    other = OTHER_SPLIT.get(reference)
    real = f"real {other} images score against the same real {reference} images" if other else "other real images score"
    count = finite(evaluation.settings.get("num_images"))
    floor_count = finite(evaluation.images(features).get("fid_floor"))
    remark = ""
    if floor_count is None:
        remark = f" How many {other or 'real'} images gave the floor is not told: it falls with their number."
    elif count and floor_count < count:
        remark = f" There are no more of them: with {number(count)} the floor would be lower."
    return (
        f"That is {number(fid / floor, 2)} times the floor of {number(floor)}, which "
        f"{f'{number(floor_count)} ' if floor_count else ''}{real}: {gap} between generated and real images.{remark}"
    )


def choice(run: Run) -> str:
    """Returns a sentence about the generator that run.keep_best chose; empty if there is none."""
    match run.chosen:
        case {"step": int() as step, "features": dict() as features, "chosen_by": dict() as by}:
            scores = {name: item.get("fid") for name, item in features.items() if isinstance(item, dict)}
            fids = [f"{name} FID {fid:.4g}" for name, value in scores.items() if (fid := finite(value)) is not None]
            best = f"Best of {counted(by.get('evaluations'), 'evaluation')} by {by.get('score')}: step {step:,}"
            return f"{best}. On images that did not choose it: {', '.join(fids) or 'no FID'}."
    return ""
