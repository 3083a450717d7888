"""Charts as inline SVG in the colours and fonts of the page that holds them, and pictures for notebooks."""

import base64
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.reporting import finite, number
from pipeline.reporting.read import Curve, Run

MAX_POINTS = 400
"""The points of a curve that are drawn. More can't be seen at the width of a chart."""
SIZE = (4.7, 2.5)
"""Width and height in inches."""
# Only CSS variables follow dark mode, and matplotlib has none. It draws in colours that nothing else has, and each is
# then replaced by its variable.
INK, RULE, LINES = "#010101", "#020202", [f"#03000{i}" for i in range(6)]
VARIABLES = {INK: "--ink-soft", RULE: "--rule"} | {colour: f"--line-{i}" for i, colour in enumerate(LINES)}


def line_chart(
    title: str, curves: Mapping[str, Curve], floor: float | None = None, smooth: bool = False, mark_ends: bool = False
) -> Markup | None:
    """Draws curves over steps, on a log scale if they span more than a factor of 20; returns None if all are empty.

    Args:
        curves: Label -> curve. The place of a curve gives its colour, also if curves before it are empty. Colours
            repeat after six curves, with other dashes.
        floor: A dashed level, left out where it would press the curves together on less than half of the height.
        smooth: Draw running means over the values, which become faint.
        mark_ends: Write the first word of each label at the end of its curve.
    """
    styles = {label: (LINES[i % 6], ("-", "--", ":", "-.")[i // 6 % 4]) for i, label in enumerate(curves)}
    curves = {label: curve for label, curve in curves.items() if curve.values}
    if not curves:
        return None
    with _chart(title) as (figure, axes):
        for label, curve in curves.items():
            colour, dashes = styles[label]
            _draw(axes, curve, smooth, color=colour, linestyle=dashes)
            if mark_ends:
                end, mark = (curve.steps[-1], curve.values[-1]), label.partition(" ")[0]
                axes.annotate(mark, end, (4, -3), textcoords="offset points", color=colour, fontsize=11, weight="bold")
        low, high, is_log = _scale(axes, curves)
        if is_log:
            axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.ticklabel_format(axis="y", scilimits=(-6, 9), useOffset=False)  # else up to 300 zeroes
        place, bottom, top = axes.transScale.transform([(1, value) for value in (floor or low, low, high)])[:, 1]
        if floor and (bottom - place <= top - bottom or top == bottom):
            axes.axhline(floor, color=INK, linewidth=1, linestyle="--")
        bottom, top = axes.dataLim.intervaly
        if all(len(curve.steps) == 1 for curve in curves.values()) and not is_log:  # else a range of rounding errors
            axes.set_ylim(min(0, 1.2 * bottom), max(0, 1.2 * top) if bottom or top else 1)
        elif axes.get_ylim()[0] < 0 <= bottom:
            axes.set_ylim(bottom=0)
        axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter=EngFormatter(sep=""))
        axes.set_xlabel("step (vertical axis: log)" if is_log else "step", color=INK, fontsize=11)
        ends = [
            f"{label} from {number(curve.values[0])} at step {number(curve.steps[0])} "
            f"to {number(curve.values[-1])} at step {number(curve.steps[-1])}"
            for label, curve in curves.items()
        ]
        return _svg(figure, f"{title} over steps: {'; '.join(ends)}")


def bar_chart(title: str, values: object, levels: object = None) -> Markup | None:
    """Draws a bar for each number in a mapping or list, with a mark across it at its entry in `levels`. Returns None if
    there is no bar. Both come from files, and may be anything."""
    bars = values if isinstance(values, dict) else dict(enumerate(values)) if isinstance(values, list) else {}
    heights = {name: height for name, value in bars.items() if (height := finite(value)) is not None}
    if not heights:
        return None
    with _chart(title) as (figure, axes):
        axes.bar(range(len(heights)), list(heights.values()), color=LINES[0], width=0.72)
        known = levels if isinstance(levels, dict) else {}
        for place, name in enumerate(heights):
            if (mark := finite(known.get(name))) is not None:
                axes.hlines(mark, place - 0.44, place + 0.44, color=INK, linewidth=1.6)
        labels = ["".join(letter if letter.isprintable() else "?" for letter in str(name))[:12] for name in heights]
        if len(labels) <= 30:
            axes.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) <= 3 else 90)
        axes.set_xlabel("class", color=INK, fontsize=11)
        return _svg(figure, f"{title}: {', '.join(f'{name} {number(value)}' for name, value in heights.items())}")


class NotebookFigure(Figure):
    """A figure that a notebook shows although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot(charts: Mapping[str, Mapping[str, Curve]]) -> NotebookFigure:
    """Draws charts, title -> label -> curve, beside each other in matplotlib's own style."""
    shown = {title: curves for title, curves in charts.items() if any(curve.values for curve in curves.values())}
    figure = NotebookFigure(figsize=(SIZE[0] * max(1, len(shown)), 1.3 * SIZE[1]), layout="constrained")
    for place, (title, curves) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), place, title=title, xlabel="step")
        for index, (label, curve) in enumerate(curves.items()):
            _draw(axes, curve, color=f"C{index}", label=label)
        _scale(axes, curves)
        axes.legend()
    return figure


def notebook_html(run: Run) -> str:
    """Returns a run's newest samples, its curves and a line about it, in HTML that needs no page around it."""
    figure = run.plot()
    pictures = [path.read_bytes() for _, path in run.grids[-1:]] + [figure._repr_png_()] * bool(figure.axes)
    sources = (f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures)
    images = "".join(f'<img src="{source}" style="max-width: 100%; image-rendering: pixelated">' for source in sources)
    return f"{images}<br><code>{html.escape(repr(run)[1:-1])}</code>"


def _draw(axes: Axes, curve: Curve, smooth: bool = False, **style: Any) -> None:
    steps, values, colour = np.array(curve.steps), np.array(curve.values), style["color"]
    drawn = np.unique(np.linspace(0, len(steps) - 1, min(MAX_POINTS, len(steps))).astype(int))
    window = np.ones(len(values) // 40)
    if smooth and len(window) > 1:
        axes.plot(steps[drawn], values[drawn], color=colour, alpha=0.3, linewidth=0.8)
        values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    marker = "o" if len(steps) < 30 else ""
    axes.plot(steps[drawn], values[drawn], linewidth=1.7, marker=marker, markersize=3, **style)
    if curve.band:
        axes.fill_between(steps, *np.array(curve.band).T, color=colour, alpha=0.2, linewidth=0)


def _scale(axes: Axes, curves: Mapping[str, Curve]) -> tuple[float, float, bool]:
    """Chooses the vertical scale; returns the least and the greatest value, and whether the scale is logarithmic."""
    values = [value for curve in curves.values() for value in curve.values]
    low, high = min(values), max(values)
    is_log = 0 < 20 * low < high
    axes.set_yscale("log" if is_log else "linear")
    return low, high, is_log


@contextmanager
def _chart(title: str) -> Iterator[tuple[Figure, Axes]]:
    """Yields an empty chart under matplotlib's settings for it. The title makes its ids differ from other charts'."""
    with (
        warnings.catch_warnings(),
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}),
    ):
        # matplotlib's font, which only measures labels, may lack their characters. The browser draws them in another.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(colors=INK, labelsize=11, length=0)
        yield figure, axes


def _svg(figure: Figure, description: str) -> Markup:
    """Returns the chart as an element of a page. matplotlib has escaped its text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, metadata, styles = r"^.*?<svg [^>]*>", r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</style>\s*</defs>"
    body = re.sub(rf'(?s){head}|{metadata}|{styles}|(?<=<g) id="[^"]*"', "", buffer.getvalue())
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    view_box = f"0 0 {72 * SIZE[0]:g} {72 * SIZE[1]:g}"  # in points
    head = f'<svg viewBox="{view_box}" role="img" aria-label="{escape(description)}">'
    return Markup(head + body.replace("xlink:href", "href"))
