"""Prints how soon runs reached an FID: `python -m pipeline.reporting.record FID RUN [RUN ...]`, a line of a table."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.distributed.launcher import run_program
from pipeline.errors import EXIT_FAILED
from pipeline.reporting.read import Run, read_run


def seconds_to_fid(run: Run, target: float) -> float:
    """Returns the seconds of training, without evaluations, until the first evaluation whose FID in mnist features is
    at most `target`; infinity if there is none."""
    fids, elapsed = run.scored("mnist", "fid"), run.logged("elapsed_seconds")
    good = min((step for step, fid in zip(fids.steps, fids.values, strict=True) if fid <= target), default=math.inf)
    after = (seconds for step, seconds in zip(elapsed.steps, elapsed.values, strict=True) if step >= good)
    return min(after, default=math.inf)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Seconds of training until runs reached an FID, evaluations left out.")
    parser.add_argument("target", type=float, metavar="FID", help="the FID to reach under mnist features")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs that differ in the seed alone")
    options = parser.parse_args(arguments)
    runs = [read_run(path) for path in options.runs]
    seconds = [seconds_to_fid(run, options.target) for run in runs]
    print(*(f"{run.folder.path}: {_text(value)}" for run, value in zip(runs, seconds, strict=True)), sep="\n")
    commit, device = (runs[0].environment.get(key) for key in ("git_commit", "device"))
    middle, worst = statistics.median(seconds), max(seconds)
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    print(f"| {today} | {commit} | {device} | {_text(middle)} | {_text(worst)} | {len(runs)} |  |")
    return 0 if math.isfinite(worst) else EXIT_FAILED


def _text(seconds: float) -> str:
    return f"{seconds:.1f} s" if math.isfinite(seconds) else "never"


if __name__ == "__main__":
    run_program(main)
