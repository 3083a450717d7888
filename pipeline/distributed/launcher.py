"""How a program starts and ends: what the launcher has put into the environment, and the exit code that it gets back.

Every program imports this first, so torch and accelerate are not imported here. No other folder of the package reads
environment variables.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pipeline import errors
from pipeline.compat import run_exit_functions
from pipeline.errors import LocalError, Preempted, RankLost, TrainingFailed, UserError

if TYPE_CHECKING:
    from pipeline.config import RuntimeConfig

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""Variables by which launchers number their processes."""
SIZES_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables from which accelerate would conclude that mpirun's processes are ranks."""
UNFIT = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables by which `accelerate launch` asks for a network that is divided among the ranks, and their names."""
FIX = "start with --multi_gpu (on CPUs too), or with a file of launch/accelerate/ (--config_file)"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing to a full disk: Python raises them without the file's name."""


# -- what the launcher says --------------------------------------------------------------------------------------------


def read_number(name: str, default: int) -> int:
    """Returns the number that the launcher put into the environment under `name` (RANK, WORLD_SIZE, LOCAL_RANK, ...).

    Raises:
        UserError: the variable holds something else.
    """
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}, no number: unset it, a launcher sets its own")
    return int(value)


def stop_file() -> Path | None:
    """Returns the path in PIPELINE_STOP_FILE, if it is set: the run stops as soon as a file is there."""
    path = os.environ.get("PIPELINE_STOP_FILE")
    return Path(path) if path else None


def launch_arguments() -> list[str] | None:
    """Returns the arguments of the `accelerate launch` that started this process; None if something else did."""
    command = parent_command()
    for index, argument in enumerate(command, 1):
        name = Path(argument).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[index:]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[index : index + 1] == ["launch"]:
            return command[index + 1 :]
    return None


def parent_command() -> list[str]:
    """Returns the command line of the process that started this one; empty where the system does not show it."""
    import psutil  # here: it takes a while, and `--help` does without

    try:
        return psutil.Process(os.getppid()).cmdline()
    except (psutil.Error, OSError):
        return []


# -- accelerate's own configuration ------------------------------------------------------------------------------------
# `accelerate config` leaves a file that every later launch of its user reads. It decides how many processes there are
# and, where runtime.device is auto, whether they use a CPU. Whatever else it asks for would change a run's numbers
# without being recorded with them, so it is refused or ignored with a line: the run's own settings decide.


def refuse_unfit_launch() -> None:
    """Raises UserError if the launcher asks for a divided network, or started another number of ranks than it was asked
    for."""
    for variable, name in UNFIT.items():
        if is_set(variable):
            raise UserError(
                f"accelerate's configuration asks for {name} ({variable}), but each rank needs a whole network: {FIX}"
            )
    requested, started = _requested_processes(), read_number("WORLD_SIZE", 1)
    if requested not in (None, started):
        fix = FIX if requested else "ask for some"
        raise UserError(f"the launcher was asked for num_processes {requested} but started {started}: {fix}")


def ignored_settings(config: RuntimeConfig) -> list[str]:
    """Returns a line for each thing that accelerate's configuration asks for and that is not done."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    lines = []
    if precision not in ("no", config.precision):
        lines.append(f"mixed_precision {precision}: not used here, set runtime.precision (it is {config.precision})")
    if backend.lower() != "no":
        lines.append(f"dynamo_backend {backend}: not used here, networks are not compiled")
    if config.device == "cuda" and is_set("ACCELERATE_USE_CPU"):
        lines.append("use_cpu: not used here, runtime.device is cuda")
    return [f"accelerate's configuration asks for {line}" for line in lines]


@contextlib.contextmanager
def environment_without_accelerate(*, keep_ranks: bool) -> Iterator[None]:
    """Hides accelerate's configuration and mpirun's numbers from the block, and without `keep_ranks` also the
    launcher's: with them, an Accelerator in a single process would wait for a rendezvous with itself."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_") and name != "ACCELERATE_CPU_AFFINITY"]
    names += [name for name in (*SIZES_OF_MPI, *(() if keep_ranks else RENDEZVOUS)) if name in os.environ]
    values = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(values)


def is_set(variable: str) -> bool:
    """Returns whether a variable of the environment holds a yes, as accelerate reads it."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _requested_processes() -> int | None:
    """Returns the number of processes that mpirun started, or the num_processes of `accelerate launch`, from its
    command line or its file; None if neither gives a number."""
    if "WORLD_SIZE" not in os.environ and (size := max(read_number(name, 1) for name in SIZES_OF_MPI)) > 1:
        return size
    if (arguments := launch_arguments()) is None:
        return None
    from accelerate.commands.config import default_config_file, load_config_from_file  # here: they cost 0.1 s
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(arguments)
    requested: int | None = options.num_processes
    if requested is None and (options.config_file or (not options.cpu and Path(default_config_file).is_file())):
        # A configuration for SageMaker has no such field.
        requested = getattr(load_config_from_file(options.config_file), "num_processes", None)
    return requested


# -- the end of a program ----------------------------------------------------------------------------------------------


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's `main` and ends the process with the exit code of its outcome (pipeline/errors.py).

    An expected error becomes one line on standard error; any other one keeps its traceback. After a stop that saved,
    the stop file is removed: `accelerate launch` turns every exit code into 1, so a batch script decides by that file
    whether to queue the job again.
    """
    # Imports of torch and its companions make 700,000 objects that stay: by default the collector walks through all of
    # them several times, for 0.7 of the 5 seconds in which a run starts.
    gc.set_threshold(20_000, 10, 10)
    rank = code = world_size = 0
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):  # nohup ignores it: so be it
        signal.signal(signal.SIGINT, interrupt)
    if os.getpid() == 1:  # in a container: the kernel drops signals for which its first process has no handler
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(errors.EXIT_TERMINATED))
    try:
        rank, world_size = read_number("RANK", 0), read_number("WORLD_SIZE", 1)
        _check_ranks()
        with _ending_at_second_interrupt():
            try:
                code = main() or 0
            finally:
                if world_size > 1:  # the launcher sends SIGTERM to those that are still saving when one rank has ended
                    for number in (signal.SIGTERM, signal.SIGUSR1):
                        signal.signal(number, lambda *_: None)
    except (Exception, KeyboardInterrupt) as error:
        expected = _print_error(error, rank, world_size)
        if expected is None and not interrupts:
            raise
        # Packages turn an interrupt during their import into other errors.
        code = errors.EXIT_INTERRUPTED if expected is None else expected
    if code == errors.EXIT_PREEMPTED and rank == 0 and (path := stop_file()) is not None:
        path.unlink(missing_ok=True)
    if world_size > 1:
        # Everything is written and closed. In an ordinary exit a rank sometimes died of SIGABRT, from a C++ thread that
        # outlived its owner, and the launcher then reported the job as failed.
        run_exit_functions()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    # An interrupt while the interpreter ends should not print a traceback either. A program that goes on keeps ^C.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _print_error(error: BaseException, rank: int, world_size: int) -> int | None:
    """Prints the line of an expected error and returns its exit code; None for an error that nobody expects."""
    match error:
        case Preempted():
            _print_line(str(error), rank)
            return errors.EXIT_PREEMPTED
        case LocalError():
            _print_line(f"{f'[rank {rank}] ' if world_size > 1 else ''}error: {error}")
            return errors.EXIT_USER_ERROR
        case UserError() | TrainingFailed():
            _print_line(f"error: {error}", rank)
            return errors.EXIT_USER_ERROR if isinstance(error, UserError) else errors.EXIT_FAILED
        case RankLost():
            return errors.EXIT_RANK_LOST
        case BrokenPipeError():  # the reader of the output, like `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return errors.EXIT_FAILED
        case OSError() if error.filename is not None or error.errno in FULL:
            reason = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            _print_line(f"error: {reason}; nothing more was written")
            return errors.EXIT_FAILED
        case KeyboardInterrupt():  # before a Runtime was there to take the signal
            _print_line("stopped by an interrupt", rank)
            return errors.EXIT_INTERRUPTED
    return None


def _check_ranks() -> None:
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if (number := read_number(name, 0)) >= (count := read_number(limit, 1)):
            values = f"the environment variable {name} is {number}, but {limit} is {count}"
            raise LocalError(f"{values}: a launcher sets both, unset them for a process alone")


@contextlib.contextmanager
def _ending_at_second_interrupt() -> Iterator[None]:
    """Ends the process at the second SIGINT in the block, even while its main thread waits in a collective: there
    Python's signal handlers do not run, but a thread that reads the numbers of signals from a pipe does."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        interrupts = 0
        while numbers := os.read(reader, 64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os.write(sys.stderr.fileno(), b"stopped at once by a second interrupt\n")
                os._exit(errors.EXIT_INTERRUPTED)
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _print_line(line: str, rank: int = 0) -> None:
    """Prints the last line of a program, on the first rank alone if every rank has the same one.

    Control characters, which a file's name may hold, are escaped: a terminal would obey them. torchrun, and so
    `accelerate launch` with several ranks, prints a page about a failed rank; the line becomes the end of that page in
    the place of "<NA>", through the file that TORCHELASTIC_ERROR_FILE names.
    """
    text = "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in line)
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}))
