"""Rows of the check's table: what was expected, what was seen, whether it holds. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.benchmarking.gpu_check.context import Context

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"
REFERENCE_STEPS = 40_000
FASTEST_SECONDS, FLOAT32_SECONDS, TIMES_PLAIN = 90.0, 1.5 * 109, 5.0
"""The goals for the reference on an H100. Its 181.8 GFLOP a step take 109 s in float32 if nothing else takes time."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    expected: str
    seen: str
    verdict: str
    """ok, FAILED or not run."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, for the JSON file."""


Rows = Iterable[Row]


@dataclass(frozen=True)
class Check:
    """Some rows that are found together."""

    name: str
    expected: str
    """What its row says when there is no other."""
    process: str
    """Checks that follow each other under one name share a process: accelerate keeps a process to one arithmetic."""
    seconds: float
    """Its time limit: several times what it should take."""
    run: Callable[[Context], Rows]
    long: bool = False
    """Left out by --quick."""

    def without_result(self, verdict: str, reason: str) -> Row:
        return Row(self.name, self.expected, reason, verdict)


def row(check: str, expected: str, seen: str, holds: bool, **numbers: Any) -> Row:
    return Row(check, expected, seen, OK if holds else FAILED, numbers)


def within(check: str, tolerance: float, difference: float, what: str, **numbers: Any) -> Row:
    """A row that holds where the difference is at most the tolerance, which no NaN is."""
    expected = f"{what} within {tolerance:.0e}" if tolerance else f"{what} bit for bit"
    return row(check, expected, f"{difference:.1e}", difference <= tolerance, difference=difference, **numbers)


def goals(rows: Sequence[Row]) -> list[Row]:
    """Rows about 40,000 steps, projected from the speeds among `rows`; none without a speed."""
    speeds = {row.check: row.numbers for row in rows if "step_seconds" in row.numbers}
    seconds = {name: float(speed["step_seconds"]) for name, speed in speeds.items()}
    plain = [float(speed["plain_seconds"]) for speed in speeds.values() if "plain_seconds" in speed]
    found = []
    float32 = [name for name, speed in speeds.items() if speed["precision"] == "float32"]
    for what, names, most in (
        ("fastest setting", list(speeds), FASTEST_SECONDS),
        ("float32", float32, FLOAT32_SECONDS),
    ):
        if names:
            best = min(names, key=seconds.__getitem__)
            total, expected = REFERENCE_STEPS * seconds[best], f"{REFERENCE_STEPS:,} steps in at most {most:.1f} s"
            found.append(row(f"goal: {what}", expected, f"{total:.0f} s ({best})", total <= most, seconds=total))
    if plain:
        times = {name: plain[0] / each for name, each in seconds.items()}
        best, own = max(times, key=times.__getitem__), max(times[name] for name in float32)
        seen = f"{times[best]:.1f} times ({best}); float32 {own:.1f} times"
        expected = f"at least {TIMES_PLAIN:.0f} times the plain float32 port"
        found.append(row("goal: fastest setting, speed", expected, seen, times[best] >= TIMES_PLAIN))
    return found


def to_text(rows: Sequence[Row]) -> str:
    """Columns check, expected, seen, verdict."""
    lines = [("check", "expected", "seen", "verdict")]
    lines += [(row.check, row.expected, row.seen, row.verdict) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def to_json(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    plain = {**facts, "rows": [asdict(row) for row in rows]}
    # JSON has no NaN and no infinity: they become words.
    return json.dumps(json.loads(json.dumps(plain), parse_constant=str), indent=1)


def exit_code(rows: Sequence[Row], *, quick: bool) -> int:
    """0 if every row holds; with `quick`, rows that were not run may be among them."""
    fine = {OK, NOT_RUN} if quick else {OK}
    return 0 if rows and all(row.verdict in fine for row in rows) else 1
