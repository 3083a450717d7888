"""Runs the pipeline's programs: on forked ranks, or with the launcher as a user does."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import Config, flatten
from pipeline.distributed.process import restoring_process as restoring_process
from pipeline.storage.checkpoint import find
from pipeline.storage.run_folder import RunFolder
from tests.ranks import ROOT as ROOT
from tests.ranks import Job

TIMEOUT_SECONDS = 600


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some settings of some sections replaced: `changed(config, training={"steps": 20})`."""
    return dataclasses.replace(
        config,
        **{name: dataclasses.replace(getattr(config, name), **settings) for name, settings in sections.items()},
    )


def tiny_config(**sections: dict[str, Any]) -> Config:
    """A run whose step takes milliseconds, changed like `changed`."""
    tiny = changed(
        Config(),
        run={"trackers": [], "log_every": 1},
        network={"width": 0.05, "latent_dim": 8},
        evaluation={"every": None},
        runtime={"device": "cpu", "threads": 1, "timeout_seconds": 300},
    )
    return changed(tiny, **sections)


def flags(config: Config) -> list[str]:
    """The command line that gives this configuration."""
    defaults = flatten(Config())
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in flatten(config).items()
        if value != defaults[key]
    ]


TINY = flags(tiny_config())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def launch(
    program: str | Path,
    arguments: Sequence[str],
    num_processes: int = 1,
    folder: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module by its name, on forked ranks; `variables` are added to the environment."""
    with tempfile.TemporaryDirectory() as name:
        stdout, stderr = Path(name, "stdout"), Path(name, "stderr")
        output = {"stdout": stdout, "stderr": stderr}
        job = Job(program, arguments, num_processes, **output, folder=folder, variables=variables)
        with job:
            code = job.wait(TIMEOUT_SECONDS)
        return subprocess.CompletedProcess([str(program), *arguments], code, stdout.read_text(), stderr.read_text())


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


def launch_as_users_do(
    script: str | Path, arguments: Sequence[str], num_processes: int = 1, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """The same by `accelerate launch`, which costs three seconds of a core for itself and each rank."""
    return subprocess.run(
        launch_command(script, arguments, num_processes),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def train_many(configs: Sequence[Config], num_processes: int) -> None:
    """Trains the runs one after the other in one job, which has the first one's precision and process settings."""
    runs = b64encode(pickle.dumps(list(configs))).decode()  # to parse as many command lines would take seconds
    result = launch(ROOT / "tests/distributed/train_many.py", [runs], num_processes)
    # Both ends: the rank that fails first may be followed by pages of those that waited for it.
    assert result.returncode == 0, f"{result.stderr[:8000]}\n[...]\n{result.stderr[-4000:]}"
    assert "bucket view strides" not in result.stderr, "DDP copies gradients into buckets of another layout"


def final_state(run: Path, step: int) -> dict[str, Tensor]:
    return find(RunFolder(run), step).tensors()
