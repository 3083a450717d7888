"""Sharded checkpoints that are either whole or absent.

A checkpoint is a folder `step-00001000`: safetensors shards, written by all ranks through torch.distributed.checkpoint,
and a manifest with the size and SHA-256 of each. Nothing here unpickles anything.

The commit protocol makes a folder of that name a promise that all its bytes are on the disk. A save takes these steps
in this order; after a power cut between any two of them a run goes on from a whole checkpoint:

1. All ranks check the state and compare their replicas. A broken state is never written.
2. They write their shards into `step-00001000.tmp`, which no reader looks at, and which `sweep` removes if a cut comes.
3. Each rank flushes its own shards to the disk, and hashes them. Before the manifest: it must not vouch for bytes that
   a cut can still take away.
4. The main rank writes and flushes the manifest, then the folder's list of names. It is complete, but not committed.
5. The log of metrics is flushed. Otherwise a run that goes on from this checkpoint could miss lines of steps before it.
6. The folder is renamed, which is atomic, and the rename is flushed. A cut before the flush leaves the old name or the
   new one: this save is lost or done, and its predecessor is there in either case.
7. Only now are older checkpoints removed, each renamed to a `.tmp` first: one removed in part has no committed name.

Disks also damage what was written well: readers compare every byte with the manifest's checksums (`verify`), and use
the checkpoint before a damaged one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed.collectives import Ranks, name_ranks
from pipeline.errors import UserError
from pipeline.storage.files import fsync, read_tensors
from pipeline.storage.run_folder import MANIFEST, RunFolder

logger = logging.getLogger(__name__)

FORMAT = 2
"""The version of what a checkpoint holds: tensors as the networks hold them, mirrored."""


class CheckpointError(UserError):
    """A checkpoint is damaged or does not exist."""


class IntegrityError(Exception):
    """The state must not be saved: replicas differ, weights left their range, or a number is not finite."""


EXPECTED = (OSError, IntegrityError)  # errors of one rank that make a save fail on all of them


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest could be read."""

    folder: Path
    format: int
    step: int
    world_size: int  # the number of ranks that wrote it; any number can read it
    progress: dict[str, Any]  # what the trainer saved beside the tensors: elapsed times, the generator's specification
    files: dict[str, dict[str, Any]]  # the shards: name -> {"num_bytes", "sha256"}

    def __str__(self) -> str:
        num_bytes = sum(entry["num_bytes"] for entry in self.files.values())
        return f"{num_bytes / 1e6:.1f} MB  world size {self.world_size}"

    def verify(self) -> Checkpoint:
        """Reads every byte and returns the checkpoint itself. Raises CheckpointError, which names a file that is
        missing, cut or changed."""
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
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors, mirrored, on the CPU. Each is whole in one shard, whichever rank wrote it."""
        tensors: dict[str, Tensor] = {}
        for name in self.files:
            try:
                tensors |= read_tensors(self.folder / name)[0]
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.folder / name}: not a safetensors file ({error})") from None
        return tensors


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the manifest of a checkpoint, not its tensors. Raises CheckpointError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
        if digest != _sha256_of_json(content):
            raise ValueError("its own SHA-256 does not match")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        return Checkpoint(folder, **content)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def committed(run: RunFolder) -> list[Path]:
    """Returns the folders of the run's committed checkpoints, oldest first."""
    return [run.checkpoint(step) for step in run.saved_steps()]


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix` and a dot, under the rest of their names."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def newest_intact(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest checkpoint that verifies, and a message about each newer one that does not."""
    damaged: list[str] = []
    for path in reversed(committed(run)):
        try:
            return read_checkpoint(path).verify(), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def find(run: RunFolder, step: int | None = None) -> Checkpoint:
    """Returns the verified checkpoint of a step, or else the newest intact one; each newer one, which is damaged, is
    named in the log, which programs show on stderr.

    Raises:
        CheckpointError: It does not exist (the message lists those that do), or the one asked for is damaged.
    """
    steps = run.saved_steps()
    if not steps:
        raise CheckpointError(f"{run.path}: holds no checkpoint, one would be in {run.checkpoints}: train it first")
    if step is None:
        newest, damaged = newest_intact(run)
        if newest is None:
            raise CheckpointError(f"{run.path}: holds no intact checkpoint{''.join(f'; {line}' for line in damaged)}")
        for line in damaged:
            logger.warning("skipped a damaged checkpoint: %s", line)
        return newest
    if step not in steps:
        raise CheckpointError(f"{run.path}: holds no checkpoint of step {step}: it has {', '.join(map(str, steps))}")
    return read_checkpoint(run.checkpoint(step)).verify()


def sweep(run: RunFolder) -> None:
    """Removes what an interrupted save or removal left."""
    for path in run.checkpoints.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# -- writing -----------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes checkpoints beside the training thread. Every rank makes the same calls in the same order.

    The training thread only copies the state to host memory. A thread of each rank does the rest; these threads have
    their own process group, because collectives of two threads in one group get mixed up.

    Args:
        keep_last: The number of newest checkpoints to keep.
        keep_every: Keep those whose step is a multiple of this, too.
        bounds: By name, bounds that tensors are clipped to, which are checked.
        best_of: Is called on the main rank with the steps that exist, and returns another one to keep.
    """

    def __init__(
        self,
        run: RunFolder,
        ranks: Ranks,
        *,
        keep_last: int,
        keep_every: int | None,
        bounds: Mapping[str, float] = {},
        best_of: Callable[[list[int]], int | None] = lambda steps: None,
    ) -> None:
        self._run, self._ranks = run, ranks.with_own_group()
        self._keep_last, self._keep_every, self._bounds, self._best_of = keep_last, keep_every, bounds, best_of
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.committed_step: int | None = None
        """The step of the newest checkpoint that this writer committed."""
        self.failures_in_a_row = 0

    def save(self, tensors: dict[str, Tensor], step: int, progress: dict[str, Any], damage: str | None = None) -> None:
        """Starts a save, after waiting for the previous one, whose error it raises (see `finish`).

        Args:
            progress: JSON-serialisable values that a resumed run needs beside the tensors.
            damage: Why this rank's state must not be saved, if that is known already.
        """
        self.finish()
        # The package brings DTensor, half a second, which only the first save should cost. It is imported in this
        # thread: of two threads that import the same packages at once, one may see a module half initialised.
        importlib.import_module("torch.distributed.checkpoint")
        # The one copy that training waits for; contiguous, because safetensors stores no strides.
        staged = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        # A daemon, unlike an executor's: after an error, a save that waits for a lost rank would keep the process for
        # half an hour, until gloo gives up.
        self._thread = threading.Thread(target=self._save, args=(staged, step, progress, damage), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save in progress, if there is one.

        Raises:
            IntegrityError: The state must not be saved; on all ranks.
            OSError: It could not be written; on all ranks. Earlier checkpoints are as they were.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _save(self, staged: dict[str, Tensor], step: int, progress: dict[str, Any], damage: str | None) -> None:
        """Follows the commit protocol; numbers are those of its steps, at the top of this file. No rank begins a step
        before all have ended the previous one, as `on_every_rank` and `gather` wait for all."""
        ranks, final = self._ranks, self._run.checkpoint(step)
        temporary = final.with_suffix(".tmp")
        try:
            ranks.on_every_rank(lambda: self._check(staged, damage), EXPECTED)  # 1
            self._compare_replicas(staged)
            ranks.on_every_rank(lambda: self._make_anew(temporary) if ranks.is_main else None, EXPECTED)  # 2
            self._write_shards(staged, temporary)
            shares = ranks.on_every_rank(lambda: self._seal_shards(temporary), EXPECTED)  # 3
            files = {name: entry for share in shares for name, entry in share.items()}
            checkpoint = Checkpoint(final, FORMAT, step, ranks.world_size, progress, files)
            ranks.on_every_rank(lambda: self._commit(temporary, checkpoint) if ranks.is_main else None, EXPECTED)  # 4-7
            self.committed_step, self.failures_in_a_row = step, 0
        except BaseException as error:
            self._error = error  # `finish` raises it
            self.failures_in_a_row += 1
            if ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # it may be what filled the disk

    def _check(self, staged: dict[str, Tensor], damage: str | None) -> None:
        if damage is not None:
            raise IntegrityError(damage)
        for name, tensor in staged.items():
            if not torch.isfinite(tensor).all():
                raise IntegrityError(f"{name} holds a number that is not finite")
            if (bound := self._bounds.get(name)) is not None:
                largest = tensor.abs().max().item()
                # The bound itself is rounded to the tensor's dtype when it clips.
                if largest > bound and not math.isclose(largest, bound, rel_tol=1e-6):
                    raise IntegrityError(f"{name} reaches {largest}, beyond the clip value {bound}")

    def _compare_replicas(self, staged: dict[str, Tensor]) -> None:
        """Raises IntegrityError if a tensor differs between ranks, as after a flipped bit in one rank's memory. The
        minority is to blame; of two ranks, the second one."""
        digests = self._ranks.gather({name: sha256_of_tensor(tensor) for name, tensor in staged.items()})
        for name in staged:
            values = [digest.get(name) for digest in digests]
            [(usual, _)] = Counter(values).most_common(1)
            if odd := [rank for rank, value in enumerate(values) if value != usual]:
                raise IntegrityError(f"{name} differs between rank {values.index(usual)} and {name_ranks(odd)}")

    def _make_anew(self, temporary: Path) -> None:
        if not self._run.config.exists():
            raise OSError(f"{self._run.path}: was moved or deleted while the run was going on")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _write_shards(self, staged: dict[str, Tensor], temporary: Path) -> None:
        """Writes the tensors, of which each rank gets a share of about equal size."""
        from torch.distributed.checkpoint.api import CheckpointException  # `save` has imported the package
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        # torch warns of saving without a process group, but a single process has none.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer, group = HuggingFaceStorageWriter(str(temporary), save_distributed=True), self._ranks.host_group
        try:
            save(staged, storage_writer=writer, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise OSError(f"{temporary}: {causes}") from None

    def _seal_shards(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Flushes the shards that this rank wrote, and returns their entries in the manifest."""
        paths = sorted(temporary.glob(f"shard-{self._ranks.rank + 1:05d}-*"))
        for path in paths:
            fsync(path)
        return {path.name: {"num_bytes": path.stat().st_size, "sha256": _sha256_of_file(path)} for path in paths}

    def _commit(self, temporary: Path, checkpoint: Checkpoint) -> None:
        manifest = {key: value for key, value in vars(checkpoint).items() if key != "folder"}
        path, final = temporary / MANIFEST, checkpoint.folder
        path.write_text(json.dumps(manifest | {"sha256": _sha256_of_json(manifest)}, indent=1))  # 4
        fsync(path)
        fsync(temporary)
        self._run.settle()  # 5
        if final.exists():  # it is damaged: a run goes on from the newest intact one, and so comes to this step again
            _remove(final)
        temporary.rename(final)  # 6
        fsync(final.parent)
        # Those of later steps are damaged as well. Counted among the last, they would take the place of good ones.
        steps = [step for step in self._run.saved_steps() if step <= checkpoint.step]
        best = self._best_of(steps)
        for step in steps[: -self._keep_last]:
            if step != best and (self._keep_every is None or step % self._keep_every):
                _remove(self._run.checkpoint(step))  # 7


def _remove(folder: Path) -> None:
    doomed = folder.with_suffix(".removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of_tensor(tensor: Tensor) -> str:
    """Returns the SHA-256 of the bytes of a CPU tensor, in the order of its elements whatever its strides."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
