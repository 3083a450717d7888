"""Goals of speed on an H100, beside what was measured. They are goals: none has to be met for a test to pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REFERENCE_STEPS = 40_000
FASTEST_SECONDS, FLOAT32_SECONDS, TIMES_PLAIN = 90.0, 1.5 * 109, 5.0
"""For the reference's steps. Its 181.8 GFLOP a step take 109 s in float32 if nothing else takes time."""


class Goal(NamedTuple):
    what: str
    seen: str
    met: bool


def goals(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Compares each goal with the figures of the tests of speed; a goal that nothing was measured for is left out."""
    speeds = [row["figures"] for row in rows if "step_seconds" in row["figures"]]
    float32 = [speed for speed in speeds if speed["precision"] == "float32"]
    found = []
    for what, among, most in (("any precision", speeds, FASTEST_SECONDS), ("float32", float32, FLOAT32_SECONDS)):
        if among:
            best = min(among, key=lambda speed: float(speed["step_seconds"]))
            seconds = REFERENCE_STEPS * float(best["step_seconds"])
            goal = f"{REFERENCE_STEPS:,} reference steps in {what} in at most {most:.0f} s"
            found.append(Goal(goal, f"{seconds:.0f} s ({best['precision']})", seconds <= most))
    if plain := next((speed["plain_seconds"] for speed in float32 if "plain_seconds" in speed), None):
        times = max(plain / speed["step_seconds"] for speed in speeds)
        goal = f"at least {TIMES_PLAIN:.0f} times the plain float32 port's speed"
        found.append(Goal(goal, f"{times:.1f} times", times >= TIMES_PLAIN))
    return found
