"""Charts as inline SVG: their scales, colours and descriptions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.reporting.charts import SIZE, bar_chart, line_chart
from pipeline.reporting.read import Curve


def test_line_chart_takes_a_log_scale_only_where_it_serves() -> None:
    def is_log(values: list[float]) -> bool:
        return "log" in str(line_chart("Title", {"a": Curve([1.0, 2.0, 3.0], values)}))

    assert is_log([1, 10, 21])
    assert not is_log([1, 10, 19])
    assert not is_log([-1, 10, 100])
    assert not is_log([0, 10, 100])
    assert line_chart("Title", {"a": Curve([], [])}) is None


@pytest.mark.parametrize(
    ("values", "floor", "to_scale"),
    [
        ([136.0, 70.0, 45.0], 0.904, True),
        ([436.0, 70.0, 15.0], 0.904, True),  # log
        ([12.0, 9.0, 8.1], 1.04, False),
        ([1200.0, 90.0, 38.0], 0.001, False),  # log
        ([3.0, 2.0, 1.0], 1.04, True),
        ([45.0], 1.04, True),
    ],
)
def test_a_curve_has_most_of_the_height_and_a_near_floor_is_shown(
    values: list[float], floor: float, to_scale: bool
) -> None:
    chart = str(line_chart("FID", {"a": Curve([float(i) for i in range(len(values))], values)}, floor))
    height = 72 * SIZE[1]
    curve = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--line-0\)', chart)[0]
    levels = re.findall(r'<path d="M \S+ (\S+)\s+L[^>]*stroke-dasharray[^>]*stroke: var\(--ink-soft\)', chart)
    places = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve)]
    assert len(values) == 1 or np.ptp(places) > 0.3 * height
    assert [max(places) < float(level) for level in levels] == [min(values) > floor] * to_scale


def test_a_chart_of_one_point_begins_at_0_and_none_without_negative_values_goes_below() -> None:
    def marks(values: list[float], width: float = 0.0) -> list[float]:
        steps, band = [float(i) for i in range(len(values))], [(value - width, value + width) for value in values]
        chart = str(line_chart("Title", {"a": Curve(steps, values, band)}))
        group = chart.split("text-anchor: end")[1:]
        return [float(text.split(">")[1].split("<")[0].replace("\u2212", "-")) for text in group]

    assert marks([0.00183608], 1e-7)[0] == 0
    assert marks([0.00183608], 1e-7)[-1] > 0.001
    assert marks([-5.0])[0] < -5 <= 0 <= marks([-5.0])[-1]
    assert marks([0.0])[0] == 0
    assert marks([0.003, 0.0004], 0.0003)[0] == 0
    assert marks([0.003, -0.002])[0] < 0


def test_smoothing_keeps_a_constant_and_flattens_noise() -> None:
    def heights(values: list[float]) -> list[list[float]]:
        """Vertical positions of the raw and of the smoothed curve."""
        curve = Curve([float(i) for i in range(200)], values)
        chart = str(line_chart("Title", {"a": curve}, smooth=True))
        curves = [path for path in re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--line-0\)', chart)]
        return [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve)] for curve in curves]

    raw, smooth = heights([5.0] * 200)
    assert np.ptp(raw) < 1e-6
    assert np.ptp(smooth) < 1e-6
    raw, smooth = heights([(-1.0) ** i for i in range(200)])
    assert np.ptp(smooth) < np.ptp(raw) / 2


def test_charts_are_described_and_follow_the_page_colours() -> None:
    chart = str(line_chart('Losses "<&', {"critic": Curve([50.0, 3000.0], [-0.25, 12345.0])}))
    assert "critic from -0.250 at step 50 to 12,345 at step 3,000" in chart
    assert "Losses &#34;&lt;&amp; over steps" in chart
    assert set(re.findall(r"#[0-9a-f]{6}\b", chart)) == set()
    assert "var(--line-0)" in chart
    bars = str(bar_chart("Shares", {"0": 0.25, "1": None, "two": 0.75}, {"two": 0.5}))
    assert 'aria-label="Shares: 0 0.250, two 0.750"' in bars
    assert bars.count("fill: var(--line-0)") == 2
    assert bar_chart("Shares", {"0": None}) is None
    assert bar_chart("Shares", "not bars") is None
