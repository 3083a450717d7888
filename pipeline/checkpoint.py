"""Sharded checkpoints that are either whole or absent, and a small command to look at them.

`python -m pipeline.checkpoint list|verify|consolidate RUN`

A checkpoint is a folder `step-00001000`: safetensors shards written by all ranks through torch.distributed.checkpoint,
and a manifest with the size and SHA-256 of each. It is written as `step-00001000.tmp` and renamed once every byte is on
the disk, so a name without `.tmp` promises a whole checkpoint, and the checksums find what rotted since. Nothing here
unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from pipeline.errors import UserError
from pipeline.distributed.process import gloo_group, run_entry

# Saving without a process group is meant: a single process has none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

MANIFEST = "manifest.json"
FORMAT = 1
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that can't be had."""


class IntegrityError(Exception):
    """The live state must not be saved: replicas differ, weights left their range, or a number is not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest could be read."""

    folder: Path
    step: int
    world_size: int
    """Ranks that wrote it; any number may read it."""
    progress: dict[str, Any]
    """What the trainer wants back beside the tensors (elapsed times)."""
    files: dict[str, dict[str, Any]]
    """Name -> {"num_bytes", "sha256"}."""

    def verify(self) -> None:
        """Reads every byte.

        Raises:
            CheckpointError: naming the file that is missing, cut or changed.
        """
        for name, expected in self.files.items():
            path = self.folder / name
            try:
                num_bytes, digest = path.stat().st_size, _sha256_of_file(path)
            except OSError as error:
                raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
            if num_bytes != expected["num_bytes"]:
                raise CheckpointError(f"{path}: {num_bytes} bytes instead of {expected['num_bytes']}")
            if digest != expected["sha256"]:
                raise CheckpointError(f"{path}: its SHA-256 is not the manifest's")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU. Replicated state is written whole, each tensor by one rank."""
        tensors: dict[str, Tensor] = {}
        for name in self.files:
            try:
                tensors |= load_file(self.folder / name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name}: not a safetensors file ({error})") from None
        return tensors


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the manifest, not the tensors.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
        if digest != _sha256_of_json(content):
            raise ValueError("its own SHA-256 does not match")
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return Checkpoint(folder, **content)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def committed(folder: Path) -> list[Path]:
    """Folders of committed checkpoints under a run's `checkpoints`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not."""
    damaged = []
    for path in reversed(committed(folder)):
        try:
            checkpoint = read_checkpoint(path)
            checkpoint.verify()
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return checkpoint, damaged
    return None, damaged


class CheckpointWriter:
    """Writes checkpoints beside the training thread. Every rank makes the same calls in the same order.

    The training thread only copies the state to host memory; checking, writing, hashing and the commit happen in a
    thread of each rank that talk over a process group of their own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        keep_last: int,
        keep_every: int | None,
        clip_value: float | None,
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._keep_last, self._keep_every, self._clip_value = keep_last, keep_every, clip_value
        self._group = gloo_group() if world_size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.committed_step: int | None = None
        """Step of the newest checkpoint that this writer committed."""
        self.failures_in_a_row = 0

    def save(self, tensors: dict[str, Tensor], step: int, progress: dict[str, Any]) -> None:
        """Starts to save; raises what the previous save ended with (see `finish`)."""
        self.finish()
        # The one copy that the training thread pays for; contiguous, as safetensors has no strides.
        staged = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._run, args=(staged, step, progress), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
            IntegrityError: the state must not be saved; on all ranks.
            OSError: it could not be written; on all ranks. The previous checkpoints are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self, staged: dict[str, Tensor], step: int, progress: dict[str, Any]) -> None:
        temporary = self._folder / f"step-{step:08d}.tmp"
        try:
            self._together(lambda: self._check(staged))
            self._compare_replicas(staged)
            self._together(lambda: self._make_folder(temporary) if self._rank == 0 else None)
            self._write_shards(staged, temporary)
            files = self._together(lambda: self._seal_shards(temporary))
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": self._world_size,
                "progress": progress,
                "files": {name: entry for part in files for name, entry in sorted(part.items())},
            }
            self._together(lambda: self._commit(temporary, manifest) if self._rank == 0 else None)
            self.committed_step, self.failures_in_a_row = step, 0
        except BaseException as error:  # raised again in the training thread by `finish`
            self._error = error
            self.failures_in_a_row += 1
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Runs `work` on each rank and returns all results; if it failed on any, every rank raises that error."""
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = (work(), None)
        except (OSError, IntegrityError) as error:
            outcome = (None, error)
        outcomes: list[Any] = [outcome]
        if self._group is not None:
            outcomes = [None] * self._world_size
            dist.all_gather_object(outcomes, outcome, group=self._group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise type(failure)(f"rank {rank}: {failure}")
        return [result for result, _ in outcomes]

    def _check(self, staged: dict[str, Tensor]) -> None:
        for name, tensor in staged.items():
            if not torch.isfinite(tensor).all():
                raise IntegrityError(f"{name} holds a number that is not finite")
            if self._clip_value is not None and name.startswith("critic."):
                largest = tensor.abs().max().item()
                # The clip rounds to the tensor's dtype.
                if largest > self._clip_value and not math.isclose(largest, self._clip_value, rel_tol=1e-6):
                    raise IntegrityError(f"{name} reaches {largest}, beyond the clip value {self._clip_value}")

    def _compare_replicas(self, staged: dict[str, Tensor]) -> None:
        digests = self._together(lambda: {name: _sha256_of_tensor(tensor) for name, tensor in staged.items()})
        for name in staged:
            values = [digest.get(name) for digest in digests]
            if len(set(values)) > 1:
                odd = [rank for rank, value in enumerate(values) if value != values[0]]
                raise IntegrityError(f"{name} differs between rank 0 and rank(s) {', '.join(map(str, odd))}")

    def _make_folder(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _write_shards(self, staged: dict[str, Tensor], temporary: Path) -> None:
        try:
            save_state(
                staged,
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise OSError(f"{temporary}: {causes}") from None

    def _seal_shards(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Flushes and hashes the shards that this rank wrote."""
        entries = {}
        for path in sorted(temporary.glob(f"shard-{self._rank + 1:05d}-*")):
            _fsync(path)
            entries[path.name] = {"num_bytes": path.stat().st_size, "sha256": _sha256_of_file(path)}
        return entries

    def _commit(self, temporary: Path, manifest: dict[str, Any]) -> None:
        path = temporary / MANIFEST
        path.write_text(json.dumps(manifest | {"sha256": _sha256_of_json(manifest)}, indent=1))
        _fsync(path)
        _fsync(temporary)
        final = temporary.with_suffix("")
        if final.exists():
            # Only a damaged checkpoint is ever written again (a run resumes from the newest intact one).
            _remove(final)
        temporary.rename(final)
        _fsync(final.parent)
        self._retire()

    def _retire(self) -> None:
        folders = committed(self._folder)
        for folder in folders[: -self._keep_last]:
            if self._keep_every is None or int(folder.name.removeprefix("step-")) % self._keep_every:
                _remove(folder)


def sweep(folder: Path) -> None:
    """Removes what an interrupted save or removal left."""
    if folder.is_dir():
        for path in folder.glob("step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Takes the committed name away first, so that a half-removed folder is never taken for a checkpoint."""
    doomed = folder.with_name(folder.name + ".removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


# -- the command -------------------------------------------------------------------------------------------------------


def _each(run: Path) -> Iterator[tuple[Path, Checkpoint | None, str]]:
    folders = committed(run / "checkpoints")
    if not folders:
        raise UserError(f"{run}: holds no checkpoint (expected {run / 'checkpoints'}/step-XXXXXXXX)")
    for folder in folders:
        try:
            yield folder, read_checkpoint(folder), ""
        except CheckpointError as error:
            yield folder, None, str(error)


def list_checkpoints(run: Path) -> int:
    """Prints step, size, world size that wrote it, and whether the manifest can be read.

    Args:
        run: The run's folder.
    """
    for folder, checkpoint, problem in _each(run):
        if checkpoint is None:
            print(f"{folder.name}  damaged: {problem}")
        else:
            size = sum(entry["num_bytes"] for entry in checkpoint.files.values()) / 1e6
            print(f"{folder.name}  {size:.1f} MB  {len(checkpoint.files)} shard(s)  world size {checkpoint.world_size}")
    return 0


def verify(run: Path) -> int:
    """Reads every byte of every checkpoint; the exit code is 2 if any is damaged.

    Args:
        run: The run's folder.
    """
    intact = True
    for folder, checkpoint, problem in _each(run):
        if checkpoint is not None:
            try:
                checkpoint.verify()
            except CheckpointError as error:
                problem = str(error)
        print(f"{folder.name}  {f'damaged: {problem}' if problem else 'verified'}")
        intact = intact and not problem
    return 0 if intact else 2


def consolidate(run: Path, out: Path, step: int | None = None) -> int:
    """Writes one checkpoint's tensors into one safetensors file.

    Args:
        run: The run's folder.
        out: The file to write; it must not exist.
        step: The checkpoint's step; the newest intact one by default.
    """
    checkpoint = find(run, step)
    if out.exists():
        raise UserError(f"{out}: exists already, name another file")
    save_file(checkpoint.tensors(), out, metadata={"step": str(checkpoint.step)})
    print(out)
    return 0


def find(run: Path, step: int | None = None) -> Checkpoint:
    """The run's checkpoint of that step, by default the newest intact one, verified.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if step is None:
        checkpoint, damaged = newest_intact(run / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{run}: holds no intact checkpoint{''.join(f'; {line}' for line in damaged)}")
        return checkpoint
    checkpoint = read_checkpoint(run / "checkpoints" / f"step-{step:08d}")
    checkpoint.verify()
    return checkpoint


if __name__ == "__main__":
    run_entry(
        lambda: auto_cli({"list": list_checkpoints, "verify": verify, "consolidate": consolidate}, as_positional=True)
    )
