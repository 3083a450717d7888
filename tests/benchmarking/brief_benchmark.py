"""pipeline/benchmark.py with rounds of a second in all in the place of half a minute."""

from typing import Any
from unittest.mock import patch

from pipeline.benchmark import main
from pipeline.benchmarking import fidelity, measure
from pipeline.distributed.launcher import run_program

BRIEF: dict[str, Any] = {
    **{"SETTLING_SECONDS": 0.1, "NEIGHBOUR_SECONDS": 0.15, "NEIGHBOUR_ROUNDS": 1, "KERNEL_ROUNDS": 2},
    **{"DATA_ROUNDS": 1, "DATA_BATCHES": 20, "EVALUATION_ROUNDS": 1, "EVALUATION_IMAGES": 100, "MATMUL_SIZE": 512},
}


def main_in_brief() -> None:
    with patch.multiple(measure, **BRIEF), patch.multiple(fidelity, SCORING_ROUNDS=1):
        main()


if __name__ == "__main__":
    run_program(main_in_brief)
