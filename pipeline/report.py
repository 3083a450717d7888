"""Reports on runs: `python pipeline/report.py RUN`, or compares several on one page: `... RUN RUN [--out FILE]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.distributed.launcher import run_program


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report on a run, or compare several on one page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as runs/wgan")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page that compares the runs (comparison.html beside the first)"
    )
    options = parser.parse_args(arguments)

    from pipeline.reporting.page import compare, write_report  # here: `--help` needs no matplotlib

    if len(options.runs) == 1 and not options.out:
        print(write_report(options.runs[0]))
    else:
        print(compare(options.runs, options.out or options.runs[0].resolve().parent / "comparison.html"))
    return 0


if __name__ == "__main__":
    run_program(main)
