"""What accelerate's own configuration asks for, a file that `accelerate config` leaves and every later launch reads.

It decides how many processes there are and, where `runtime.device` is auto, whether they take a CPU. All else that it
may hold would change a run's numbers without being recorded with them: our settings decide that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import RuntimeConfig
from pipeline.distributed.launcher import launch_arguments, told
from pipeline.errors import UserError

UNFIT = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables by which the launcher asks for a network that is divided among the ranks."""
NUMBERS_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which accelerate takes processes that mpirun started for ranks."""
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
FIX = "start with --multi_gpu (on CPUs too), or with a file of launch/accelerate/ (--config_file)"


def refuse_unfit() -> None:
    """Raises UserError for a way of training that is none of ours, and for another number of ranks than asked for."""
    for variable, name in UNFIT.items():
        if _is_set(variable):
            raise UserError(
                f"accelerate's configuration asks for {name} ({variable}), but each rank needs a whole network: {FIX}"
            )
    asked, started = _processes_asked_for(), told("WORLD_SIZE", 1)
    if asked not in (None, started):
        fix = FIX if asked else "ask for some"
        raise UserError(f"the launcher was asked for num_processes {asked} but started {started}: {fix}")


def unused(config: RuntimeConfig) -> list[str]:
    """A line for each thing that is asked for and not done."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    lines = []
    if precision not in ("no", config.precision):
        lines.append(f"mixed_precision {precision}: not used here, set runtime.precision (it is {config.precision})")
    if backend.lower() != "no":
        lines.append(f"dynamo_backend {backend}: not used here, networks are not compiled")
    if config.device == "cuda" and asks_for_cpu():
        lines.append("use_cpu: not used here, runtime.device is cuda")
    return [f"accelerate's configuration asks for {line}" for line in lines]


def asks_for_cpu() -> bool:
    return _is_set("ACCELERATE_USE_CPU")


@contextlib.contextmanager
def hidden(several: bool) -> Iterator[None]:
    """Hides within the block what accelerate would read in the environment: its configuration; and of `several` ranks'
    meeting what mpirun says of it, of a process alone all, since it would wait for itself."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_") and name != "ACCELERATE_CPU_AFFINITY"]
    names += [name for name in (*NUMBERS_OF_MPI, *(() if several else RENDEZVOUS)) if name in os.environ]
    values = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(values)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _processes_asked_for() -> int | None:
    """The number of mpirun's processes, or the num_processes of `accelerate launch` by its command line or file; None
    where neither says any."""
    if "WORLD_SIZE" not in os.environ and (started := max(told(name, 1) for name in NUMBERS_OF_MPI)) > 1:
        return started
    if (arguments := launch_arguments()) is None:
        return None
    from accelerate.commands.config import default_config_file, load_config_from_file  # here: they cost 0.1 s
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(arguments)
    asked: int | None = options.num_processes
    if asked is None and (options.config_file or (not options.cpu and Path(default_config_file).is_file())):
        asked = getattr(load_config_from_file(options.config_file), "num_processes", None)  # SageMaker's has none
    return asked
