"""Trains several runs one after the other in one job: `train_many.py CONFIGS`, a pickled list in base 64.

A job of processes takes seconds to start, so the tests share one among runs that need the same number of ranks.
"""

from __future__ import annotations

import pickle
import sys
from base64 import b64decode
from unittest.mock import patch

from pipeline.config import Config
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer


def main() -> int:
    configs: list[Config] = pickle.loads(b64decode(sys.argv[1]))
    runtime = Runtime(configs[0].runtime)
    with patch("pipeline.reporting.page.write_report"):  # it takes as long as the run, and nobody looks at it
        for config in configs:
            Trainer(config, runtime).run()
    runtime.close()
    return 0


if __name__ == "__main__":
    run_program(main)
