"""What the tests of the benchmark share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    NetworkConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
)
from pipeline.distributed.process import Runtime
from tests.jobs import restoring_process

RUNTIME = RuntimeConfig(device="cpu", threads=1, precision="float64")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with restoring_process():
        yield Runtime(RUNTIME)


@pytest.fixture
def config(tiny_dataset: Path, tmp_path: Path) -> Config:
    """A run whose steps take milliseconds."""
    return Config(
        run=RunConfig(root=str(tmp_path), trackers=[]),
        data=DataConfig(dataset=str(tiny_dataset)),
        network=NetworkConfig(latent_dim=8, width=0.05),
        training=TrainingConfig(batch_size=64),
        evaluation=EvaluationConfig(every=None),
        runtime=RUNTIME,
    )
