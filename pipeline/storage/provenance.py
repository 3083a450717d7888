"""What a run was made with: versions, commit, hardware."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.distributed.collectives import Ranks

PACKAGES = ("torch", "accelerate", "webdataset", "torchmetrics", "torch-fidelity", "numpy")


def provenance(ranks: Ranks, device: torch.device, cores: int, slurm_job_id: str | None) -> dict[str, Any]:
    """For the run's environment.json. `cores`: of this machine, all ranks' together."""
    return {
        "git_commit": _git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "world_size": ranks.world_size,
        "device": device_name(device, cores),
        "threads_per_rank": torch.get_num_threads(),
        "hostname": os.uname().nodename,
        "slurm_job_id": slurm_job_id,
    }


def device_name(device: torch.device, cores: int) -> str:
    """The GPU's name, or the processor's and how many cores of it there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{cores} x {names[0] if names else 'CPU'}"


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
