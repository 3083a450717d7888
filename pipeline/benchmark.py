"""Measures this machine: `accelerate launch pipeline/benchmark.py [--config FILE] [--json FILE]`."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError


def main() -> None:
    parser = make_parser("Measure data sources and training steps; what is compared is measured in turn.")
    parser.add_argument("--json", type=Path | None, help="also write the figures to this file, which must not exist")
    parser.add_argument("--steps", type=int, default=30, help="training steps to measure")
    config, arguments = parse(parser)
    if arguments.json is not None and arguments.json.exists():
        raise UserError(f"--json is {arguments.json}: exists already, name another file")
    if arguments.steps < 10:
        raise UserError(f"--steps is {arguments.steps}: give at least 10")

    # Imported here, so that `--help` and mistakes need no torch.
    from pipeline.benchmarking.fidelity import measure_scoring
    from pipeline.benchmarking.measure import measure_data, measure_training
    from pipeline.data import open_dataset
    from pipeline.distributed.failures import closing
    from pipeline.distributed.process import Runtime
    from pipeline.storage.files import write_text

    with closing(Runtime(config.runtime), config) as runtime:
        dataset = runtime.ranks.on_main(lambda: open_dataset(config.data))
        # One rank measures the sources: their figures are per core.
        figures = runtime.ranks.on_main(lambda: measure_data(config, runtime, dataset))
        figures |= measure_training(config, runtime, arguments.steps)
        figures |= measure_scoring(config, runtime, dataset)
    if runtime.ranks.is_main:
        print(json.dumps(figures, indent=1))
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_program(main)
