"""The losses of micro-batches, in the precision of the run. (Trajectories: tests/distributed/test_trajectory.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer
from tests.jobs import restoring_process, tiny_config


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("critic_updates", ["joint", "separate"])
def test_losses_of_micro_batches_are_those_of_the_batch_in_float64(
    critic_updates: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Means over four parts of four images are the mean over sixteen; float32 would round them at 1e-7."""

    def losses(accumulation: int) -> Tensor:
        config = tiny_config(
            run={"root": str(tmp_path)},
            data={"dataset": str(tiny_dataset)},
            training={"objective": "gan", "clip_value": None, "batch_size": 16, "critic_updates": critic_updates},
            runtime={"precision": "float64", "accumulation": accumulation},
        )
        runtime = Runtime(config.runtime)
        trainer = Trainer(config, runtime)
        trainer.take_step()
        runtime.close()
        return trainer.log.losses()

    with restoring_process():
        torch.testing.assert_close(losses(4), losses(1), rtol=1e-13, atol=0)
