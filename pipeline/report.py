"""Reports on a run, `python pipeline/report.py RUN`, or compares several on one page: `... 'runs/*' [--out FILE]`."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Parser
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.storage.run_folder import comparison


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description="Report on a run, or compare several on one page.")
    runs_help = "a run's folder, such as runs/wgan, a pattern such as 'runs/*', or a folder of runs"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=runs_help)
    out_help = "page that compares the runs (comparison.html in the folder of all); its numbers go beside it"
    parser.add_argument("--out", type=Path, metavar="FILE.html", help=out_help)
    options = parser.parse_args(arguments)
    if options.out and options.out.suffix != ".html":
        raise UserError(f"--out is {options.out}: name a page .html; its numbers go beside it as .csv and .json")

    # Imported here, so that `--help` and mistakes need no matplotlib.
    from pipeline.reporting.comparison import find_runs
    from pipeline.reporting.page import compare, write_report

    runs = find_runs(options.runs)
    if len(runs) == 1 and len(options.runs) == 1 and not options.out:
        print(write_report(runs[0]))
    else:
        together = Path(os.path.commonpath([run.resolve().parent for run in runs]))
        together = together.relative_to(Path.cwd()) if together.is_relative_to(Path.cwd()) else together
        print(compare(runs, options.out or comparison(together)))


if __name__ == "__main__":
    run_program(main)
