"""All checks, in the order in which they are run."""

from __future__ import annotations

import gc
import signal
from functools import partial

import torch

from pipeline.benchmarking.gpu_check import exact, launches, speed
from pipeline.benchmarking.gpu_check.context import Context
from pipeline.benchmarking.gpu_check.table import Check, Rows, row
from pipeline.distributed.collectives import Ranks
from pipeline.storage.provenance import provenance

OBJECTIVES = ("wgan", "wgan_notebook", "wgan_gp", "lsgan", "gan", "acgan", "quickstart")
"""Files of configs/; the last one is of acwgan."""


def machine(context: Context) -> Rows:
    count = torch.cuda.device_count()
    device = torch.device("cuda" if count else "cpu")
    facts = provenance(Ranks(), device, 0, None)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    facts |= {"gpus": count, "cuda": torch.version.cuda, "cudnn": cudnn}
    seen = f"{count} x {facts['device']}, torch {torch.__version__}" if count else "torch sees none"
    yield row("machine", "a CUDA device", seen, count > 0, **facts)


def free_memory() -> None:
    """Between two checks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


CHECKS = (
    Check("machine", "a CUDA device", "cpu", 60, machine),
    Check("CPU", "finite losses", "cpu", 60, exact.walk_on_cpu),
    Check("GPU against CPU", "the same trajectory", "float", 60, exact.against_cpu),
    *(
        Check(f"graph, {name}", "eager steps", "float", 30, partial(exact.graph_against_eager, name=name))
        for name in OBJECTIVES
    ),
    Check("stop and resume, eager", "bit for bit", "float", 30, partial(exact.resume, graph=False)),
    Check("stop and resume, captured", "bit for bit", "float", 30, partial(exact.resume, graph=True)),
    *(
        Check(f"host waits, {name}", "none in steps and inputs", "float", 15, partial(speed.waits, name=name))
        for name in OBJECTIVES
    ),
    Check("features", "those of the CPU", "float", 30, exact.features),
    Check("replay", "some convolutions", "float", 30, speed.replay),
    *(
        Check(f"speed, {name}", "finite losses", "float", 40, partial(speed.speed, precision=name), long=True)
        for name in ("float32", "tf32", "float64")
    ),
    *(
        Check(f"layout, {name}", "the default is fast", "float", 40, partial(speed.layouts, precision=name), long=True)
        for name in ("float32", "tf32")
    ),
    Check("speed, bf16", "finite losses", "bf16", 50, partial(speed.speed, precision="bf16"), long=True),
    Check("layout, bf16", "the default is fast", "bf16", 40, partial(speed.layouts, precision="bf16"), long=True),
    Check("fp16", "finite losses, a sane scale", "fp16", 30, exact.fp16),
    Check("speed, fp16", "finite losses", "fp16", 30, partial(speed.speed, precision="fp16"), long=True),
    Check("group of one", "DDP, batch norm, capture", "launches", 60, launches.group_of_one),
    Check("group of one, failure", "ends and says why", "launches", 60, launches.group_of_one_fails),
    Check("several GPUs", "one trajectory", "launches", 120, launches.trajectories),
    *(
        Check(f"{number.name}", "ends, goes on", "launches", 200, partial(launches.lost_rank, number=number))
        for number in (signal.SIGKILL, signal.SIGSTOP)
    ),
    Check("scaling", "images/s", "launches", 160, launches.scaling, long=True),
    Check("training", "memory flat, FID falling", "float", 120, exact.training, long=True),
)
