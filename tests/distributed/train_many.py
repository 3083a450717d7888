"""Trains several runs one after the other in one job: `train_many.py CONFIGS`, a pickled list in base 64.

A job of processes takes seconds to start, so the tests share one among runs that need the same number of ranks.
"""

from __future__ import annotations

import faulthandler
import pickle
import sys
from base64 import b64decode
from unittest.mock import patch

from torch import nn

from pipeline.config import Config
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.step import Step
from pipeline.training.trainer import Trainer


def timed(trainer: Trainer) -> list[str]:
    """What DDP has measured of the iterations, in its own words."""
    step = trainer.step
    assert isinstance(step, Step)
    wrapped = [each for each in (step.critic, step.generator) if isinstance(each, nn.parallel.DistributedDataParallel)]
    return [key for each in wrapped for key in each._get_ddp_logging_data() if key.startswith("avg_")]  # type: ignore[no-untyped-call]


def main() -> int:
    configs: list[Config] = pickle.loads(b64decode(sys.argv[1]))
    runtime = Runtime(configs[0].runtime)
    with patch("pipeline.reporting.page.write_report"):  # it takes as long as the run, and nobody looks at it
        for config in configs:
            faulthandler.dump_traceback_later(120)  # a run takes a second: where each rank is that hangs
            trainer = Trainer(config, runtime)
            trainer.run()
            assert not timed(trainer), "DDP timed its iterations: on a GPU the host waits for it then"
    faulthandler.cancel_dump_traceback_later()
    runtime.close()
    return 0


if __name__ == "__main__":
    run_program(main)
