"""Reports of runs: report.html, report.md and report.json of one, or one HTML page that compares several.

Whatever part of a run is missing is left out, and the same folder gives the same bytes. The pages need nothing but
themselves: styles, charts and images are inside them.
"""

import base64
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from pipeline.errors import UserError
from pipeline.reporting.charts import bar_chart, line_chart
from pipeline.reporting.comparison import compared
from pipeline.reporting.formatting import (
    code,
    copies_in_words,
    counted,
    critic_in_words,
    duration,
    few_images,
    number,
    percent,
    setting,
    verdict,
)
from pipeline.reporting.read import Run, read_run
from pipeline.storage.files import replacing

MAX_GRIDS = 40
IMAGE_BYTES = 1_500_000  # of all images of a page, before base64 adds a third: keeps the page under 3 MB


def write_report(run: Path) -> Path:
    """Writes report.html, report.md and report.json into the run's folder and returns the path of the first.

    Raises:
        UserError: not a run's folder, or it cannot be written to.
    """
    content = read_run(run)
    folder, grids, notes = content.folder, content.grids, content.notes
    num_kept = min(len(grids), MAX_GRIDS)
    kept = [grids[round(i * (len(grids) - 1) / max(1, num_kept - 1))] for i in range(num_kept)]
    share = IMAGE_BYTES // (num_kept + 11)  # five each for the neighbours and the interpolation, one for real images
    frames = [(step, image) for step, path in kept if (image := data_uri(path, share, notes))]
    real = data_uri(folder.real_images(), share, notes)
    neighbours = data_uri(folder.newest_neighbours(), 5 * share, notes)
    interpolation = data_uri(folder.newest_interpolation(), 5 * share, notes)
    pictures = {"frames": frames, "real": real, "neighbours": neighbours, "interpolation": interpolation}
    page = _render("html", run=content, nearest=_nearest(content), **pictures)
    _write(folder.report("json"), json.dumps(_summary(content), indent=2, default=str) + "\n")
    _write(folder.report("md"), _render("md", run=content))
    _write(folder.report("html"), page)
    return folder.report("html")


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Writes one page with runs side by side to `out` and returns it: settings that differ, scores (seeds of one
    configuration by median and spread), newest grids. Its numbers are beside it, as .csv and .json.

    A best is named among those that were scored in the same way, of which there must be two; of the others is told
    what differs.

    Raises:
        UserError: one of `runs` is not a run's folder, or `out` cannot be written.
    """
    comparison = compared([read_run(run) for run in runs])
    newest = {
        letter: (step, image)
        for letter, run in comparison.runs.items()
        for step, path in run.grids[-1:]
        if (image := data_uri(path, IMAGE_BYTES // len(runs), run.notes))
    }
    _write(out, _render("html", runs=comparison.runs, comparison=comparison, newest=newest))
    _write(out.with_suffix(".csv"), comparison.to_csv())
    _write(out.with_suffix(".json"), comparison.to_json())
    return out


def data_uri(path: Path | None, max_bytes: int, notes: list[str]) -> tuple[str, bool] | None:
    """The image as a data URI of at most `max_bytes` before base64, and whether it has so few pixels that they show.

    Lossless if that fits, else WebP, halved until it fits (but for images of 16 pixels). None where there is no image,
    or a damaged one, which is noted.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as source:
            image = source.convert("L" if source.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow raises any of them for a damaged file
        notes.append(f"{path.name} is damaged")
        return None
    few_pixels, kind, buffer = image.width <= 400, "png", io.BytesIO()
    image.save(buffer, kind, optimize=True)
    while buffer.tell() > max_bytes and min(image.size) > 16:
        image = image.reduce(2) if kind == "webp" else image
        kind, buffer = "webp", io.BytesIO()
        image.save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", few_pixels


def _nearest(run: Run) -> tuple[int, object]:
    """How many training images are beside each generated one in the picture of neighbours, and of how many."""
    for scores in run.latest.features.values() if run.latest else ():
        match scores.get("nearest_training_images"):
            case {"indices": [[*row], *_], **more}:
                return len(row), more.get("among")
    return 5, None


def _summary(run: Run) -> dict[str, object]:
    """What report.json holds."""
    latest = run.latest
    return {
        "run": run.name,
        "status": run.status,
        "step": run.step,
        "verdict": {name: verdict(latest, name) for name in latest.features} if latest else {},
        "warning": few_images(latest.settings.get("num_images")) if latest else None,
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
    jinja.filters |= {"number": number, "duration": duration, "percent": percent, "setting": setting, "code": code}
    jinja.globals |= {"line_chart": line_chart, "bar_chart": bar_chart, "verdict": verdict, "few_images": few_images}
    jinja.globals |= {"counted": counted, "copies_in_words": copies_in_words, "critic_in_words": critic_in_words}
    return jinja


def _render(kind: str, **context: object) -> str:
    return _templates().get_template(f"page.{kind}.jinja").render(context)


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
