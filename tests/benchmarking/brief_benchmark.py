"""pipeline/benchmark.py with a second beside another process in the place of twenty."""

from unittest.mock import patch

from pipeline.benchmark import main
from pipeline.benchmarking import measure
from pipeline.distributed.launcher import run_program


def main_in_brief() -> None:
    with patch.multiple(measure, SETTLING_SECONDS=0.1, NEIGHBOUR_SECONDS=0.15):
        main()


if __name__ == "__main__":
    run_program(main_in_brief)
