"""Runs the pipeline's programs as a user does: real processes, the real launcher."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.distributed.stopping import STOP_SIGNALS
from pipeline.storage.checkpoint import find

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 600

TINY = [
    *("--network.width", "0.05", "--network.latent_dim", "8", "--training.batch_size", "64"),
    *("--run.trackers", "[]", "--run.log_every", "1", "--evaluation.every", "null", "--runtime.device", "cpu"),
    *("--runtime.threads", "1", "--runtime.timeout_seconds", "60"),
]
"""Settings under which a step takes milliseconds."""


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some settings of some sections replaced: `changed(config, training={"steps": 20})`."""
    return dataclasses.replace(
        config,
        **{name: dataclasses.replace(getattr(config, name), **settings) for name, settings in sections.items()},
    )


def launch_command(
    script: str | Path, arguments: Sequence[str], num_processes: int, *launcher_options: str
) -> list[str]:
    """The README's launch commands, for one process or several on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if num_processes > 1:
        launcher += ["--config_file", str(ROOT / "launch/accelerate/cpus.yaml"), "--num_processes", str(num_processes)]
    else:
        launcher += ["--config_file", str(ROOT / "launch/accelerate/cpu.yaml")]
    return [*launcher, *launcher_options, str(script), *arguments]


def launch(
    script: str | Path, arguments: Sequence[str], num_processes: int = 1, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launch_command(script, arguments, num_processes),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def train_many(runs: Sequence[Sequence[str]], num_processes: int) -> None:
    """Trains the runs one after the other in one job."""
    result = launch(ROOT / "tests/distributed/train_many.py", [json.dumps(runs)], num_processes)
    assert result.returncode == 0, result.stderr[-4000:]


def final_state(run: Path, step: int) -> dict[str, Tensor]:
    return find(run, step).tensors()


@contextmanager
def process_kept() -> Iterator[None]:
    """A Runtime in the test's own process takes over its signals and arithmetic: they are given back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        torch.set_flush_denormal(False)
