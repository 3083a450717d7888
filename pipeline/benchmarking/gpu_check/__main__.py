"""Checks the pipeline on this machine's GPUs: `launch/gpu_check.sh [--quick] [--only NAME ...] [-- --KEY VALUE ...]`.

Prints a table (check, expected, seen, verdict), writes it as JSON, and ends with 0 if every row holds, else 1. Takes
ten minutes at most and needs no network. What follows `--` are settings of the pipeline that hold in every check.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from datetime import datetime
from pathlib import Path

from pipeline.benchmarking.gpu_check.table import NOT_RUN, OK, Row, exit_code, goals, to_json, to_text
from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.storage.files import write_text

USAGE = "gpu_check.sh [--quick] [--only NAME ...] [--json FILE] [--minutes N] [-- --KEY VALUE ...]"


def main() -> int:
    options, settings = _options(sys.argv[1:])
    from pipeline.benchmarking.gpu_check import checks  # here: `--help` and mistakes need no torch
    from pipeline.benchmarking.gpu_check.context import Context
    from pipeline.benchmarking.gpu_check.worker import run_checks

    chosen = [check for check in checks.CHECKS if any(text in check.name for text in options.only)]
    if not chosen:
        names = ", ".join(check.name for check in checks.CHECKS)
        raise UserError(f"--only is {' '.join(options.only)}: choose from {names}")
    started, rows = time.monotonic(), list[Row]()

    def add(row: Row) -> None:
        rows.append(row)
        seconds = time.monotonic() - started
        print(f"{seconds:4.0f} s  {row.verdict:<8} {row.check}: {row.seen}", file=sys.stderr, flush=True)
        write_text(options.json, to_json({"settings": settings, "seconds": seconds}, rows))

    run = [check for check in chosen if not (check.long and options.quick)]
    with tempfile.TemporaryDirectory() as name:
        Context(Path(name), settings).prepare_pictures()
        for row in run_checks(checks.__name__, run, Path(name), settings, options.minutes):
            add(row)
    for row in [check.without_result(NOT_RUN, "left out by --quick") for check in chosen if check not in run]:
        add(row)
    for row in goals(rows):
        add(row)
    held = sum(row.verdict == OK for row in rows)
    print(f"{to_text(rows)}\n{held} of {len(rows)} hold, {time.monotonic() - started:.0f} s, {options.json}")
    return exit_code(rows, quick=options.quick)


def _options(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The check's own options, and the pipeline's settings, which stand behind `--`."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, settings = arguments[:place], arguments[place + 1 :]
    parser = ArgumentParser(prog="gpu_check.sh", usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="leave out speeds, scaling and the long training")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="checks whose names hold one of these")
    parser.add_argument("--json", type=Path, help="file to write, which must not exist (default: gpu_check-TIME.json)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all; each check's limit grows with it")
    options = parser.parse_args(own)
    options.json = (options.json or Path(f"gpu_check-{datetime.now():%Y%m%d-%H%M%S}.json")).absolute()
    if options.json.exists():
        raise UserError(f"--json is {options.json}: exists already, name another file")
    parse(make_parser(""), settings)
    try:
        write_text(options.json, to_json({}, []))  # rather now than after ten minutes
    except OSError as error:
        raise UserError(f"--json is {options.json}: can't be written ({error.strerror}), name another file") from None
    return options, settings


if __name__ == "__main__":
    run_program(main)
