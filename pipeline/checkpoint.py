"""Inspects a run's checkpoints: `python -m pipeline.checkpoint list|verify|consolidate RUN ...`."""

from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from pipeline.config import Parser
from pipeline.distributed.launcher import run_program
from pipeline.errors import EXIT_USER_ERROR, UserError
from pipeline.storage.checkpoint import CheckpointError, committed, find, read_checkpoint
from pipeline.storage.files import write_tensors
from pipeline.storage.run_folder import RunFolder


def show(run: Path) -> None:
    """Prints step, size, world size that wrote it, and whether the manifest can be read."""
    _print_checkpoints(run, every_byte=False)


def verify(run: Path) -> int:
    """Reads every byte of every checkpoint; the exit code is 2 if any is damaged."""
    return 0 if _print_checkpoints(run, every_byte=True) else EXIT_USER_ERROR


def consolidate(run: Path, out: Path, step: int | None = None) -> None:
    """Writes a checkpoint as one safetensors file of mirrored tensors, for programs of your own; those here take runs.

    Args:
        run: The run's folder.
        out: The file to write; it must not exist.
        step: The checkpoint's step; the newest intact one by default.
    """
    checkpoint = find(RunFolder(run), step)
    if out.exists():
        raise UserError(f"{out}: exists already, name another file")
    write_tensors(out, checkpoint.tensors(), {"step": str(checkpoint.step), "orientation": "mirrored"})
    print(out)


def _print_checkpoints(run: Path, *, every_byte: bool) -> bool:
    """Prints a line for each checkpoint; returns True if none is damaged."""
    folders, intact = committed(RunFolder(run)), True
    if not folders:
        raise UserError(f"{run}: holds no checkpoint (expected {RunFolder(run).checkpoints}/step-XXXXXXXX)")
    for folder in folders:
        try:
            line = "verified" if every_byte and read_checkpoint(folder).verify() else str(read_checkpoint(folder))
        except CheckpointError as error:
            line, intact = f"damaged: {error}", False
        print(f"{folder.name}  {line}")
    return intact


if __name__ == "__main__":
    commands: dict[str, Any] = {"list": show, "verify": verify, "consolidate": consolidate}
    run_program(lambda: auto_cli(commands, prog="gan-pipeline checkpoint", parser_class=Parser))
