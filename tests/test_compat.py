"""What is used of other packages' private names does what it is used for."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from tqdm import tqdm

from pipeline import compat
from pipeline.config import make_parser
from tests.jobs import ROOT, restoring_process


@pytest.fixture
def wrapped(tmp_path: Path) -> Iterator[nn.parallel.DistributedDataParallel]:
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        compat.leave_buffers_alone(network)
        yield nn.parallel.DistributedDataParallel(network)
    finally:
        dist.destroy_process_group()


def test_run_exit_functions() -> None:
    program = (
        "import atexit, os; from pipeline import compat; atexit.register(print, 'the end', flush=True); "
        "compat.run_exit_functions(); os._exit(0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "the end\n"


def test_leave_buffers_alone(wrapped: nn.parallel.DistributedDataParallel) -> None:
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= wrapped.parameters_to_ignore


def test_settle_buckets(wrapped: nn.parallel.DistributedDataParallel) -> None:
    """DDP would group its gradients anew after the first backward pass: then there is nothing left to do."""
    compat.settle_buckets(wrapped)
    wrapped(torch.rand(5, 3)).sum().backward()
    assert not wrapped.reducer._rebuild_buckets()


def test_stop_timing(wrapped: nn.parallel.DistributedDataParallel) -> None:
    compat.stop_timing(wrapped)
    for _ in range(3):
        wrapped(torch.rand(5, 3)).sum().backward()
    assert not [key for key in wrapped._get_ddp_logging_data() if key.startswith("avg_")]  # type: ignore[no-untyped-call]


def test_fresh_accelerate() -> None:
    with restoring_process():
        Accelerator(cpu=True, mixed_precision="bf16")
        with compat.fresh_accelerate():
            assert not PartialState().initialized or Accelerator(cpu=True).mixed_precision == "no"
        assert AcceleratorState().mixed_precision == "bf16"


def test_has_matrix_tiles() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert not compat.has_matrix_tiles() or "amx_tile" in flags


def test_arguments_of() -> None:
    names = {argument.dest for argument in compat.arguments_of(make_parser("any"))}
    assert {"config", "training.steps", "run.name"} <= names


def test_time_by_steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back a day leaves the bar's own time alone."""
    bar = tqdm(total=10, file=io.StringIO())
    compat.time_by_steady_clock(bar)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    bar.update(1)
    assert 0 <= bar.format_dict["elapsed"] < 3600
    bar.close()
