"""Trains several runs one after the other in one job: `train_many.py '[["--run.name", "a", ...], ...]'`.

A job of processes takes seconds to start, so the tests share one among runs that need the same number of ranks.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer


def main() -> int:
    configs = [parse(make_parser("test"), arguments)[0] for arguments in json.loads(sys.argv[1])]
    runtime = Runtime(configs[0].runtime)
    with patch("pipeline.reporting.page.write_report"):  # it takes as long as the run, and nobody looks at it
        for config in configs:
            Trainer(config, runtime).run()
    runtime.close()
    return 0


if __name__ == "__main__":
    run_program(main)
