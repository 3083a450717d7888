"""Sharded checkpoints that are either whole or absent.

A checkpoint is a folder `step-00001000`: safetensors shards written by all ranks through torch.distributed.checkpoint,
and a manifest with the size and SHA-256 of each. It is written as `step-00001000.tmp` and renamed once every byte is on
the disk, so a name without `.tmp` promises a whole checkpoint, and the checksums find what rotted since. Nothing here
unpickles anything.
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
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.models.networks import critic_base, mirror
from pipeline.models.spectral_norm import SINGULAR_VECTORS
from pipeline.storage.files import fsync
from pipeline.storage.run_folder import RunFolder, step_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2
"""2: tensors as the networks hold them, mirrored. 1, still read: in Keras's orientation."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that can't be had."""


class IntegrityError(Exception):
    """The live state must not be saved: replicas differ, weights left their range, or a number is not finite."""


EXPECTED = (OSError, IntegrityError)
"""What a save may fail of on one rank; every rank then fails of it."""

# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest could be read."""

    folder: Path
    format: int
    step: int
    world_size: int
    """Ranks that wrote it; any number may read it."""
    progress: dict[str, Any]
    """What the trainer wants back beside the tensors (elapsed times, the generator's specification)."""
    files: dict[str, dict[str, Any]]
    """Name -> {"num_bytes", "sha256"}."""

    def __str__(self) -> str:
        num_bytes = sum(entry["num_bytes"] for entry in self.files.values())
        return f"{num_bytes / 1e6:.1f} MB  {len(self.files)} shard(s)  world size {self.world_size}"

    def verify(self) -> Checkpoint:
        """Reads every byte; returns itself.

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
        return self

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, mirrored, on the CPU. Replicated state is written whole, each tensor by one rank."""
        tensors: dict[str, Tensor] = {}
        for name in self.files:
            try:
                tensors |= load_file(self.folder / name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name}: not a safetensors file ({error})") from None
        return self._mirrored(tensors) if self.format == 1 else tensors

    def _mirrored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shape = self.progress["generator"]["image_shape"]
        generator = (shape[1] // 4, shape[2] // 4)
        bases = {"generator": generator, "ema": generator, "critic": critic_base(shape, 8)}
        for name, tensor in tensors.items():
            role, _, own_name = name.partition(".")
            if base := bases.get(role.removesuffix("_optimizer")):
                tensors[name] = mirror(own_name, tensor, base)
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
        if content["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"its format is {content['format']}, later than {FORMAT}")
        return Checkpoint(folder, **content)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def committed(run: RunFolder) -> list[Path]:
    """Folders of the run's committed checkpoints, oldest first."""
    paths = run.checkpoints.iterdir() if run.checkpoints.is_dir() else []
    steps = [step for path in paths if not path.suffix and (step := step_of(path)) is not None]
    return [run.checkpoint(step) for step in sorted(steps)]


def newest_intact(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not."""
    damaged: list[str] = []
    for path in reversed(committed(run)):
        try:
            return read_checkpoint(path).verify(), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def find(run: RunFolder, step: int | None = None) -> Checkpoint:
    """The run's checkpoint of that step, by default the newest intact one, verified. Each newer one that is damaged is
    named in a line of the log, which programs show on stderr.

    Raises:
        CheckpointError: there is none (it tells which there are), or the one named is damaged.
    """
    steps = [step_of(folder) for folder in committed(run)]
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

    The training thread only copies the state to host memory; checking, writing, hashing and the commit happen in a
    thread of each rank that talk over a process group of their own.
    """

    def __init__(
        self,
        run: RunFolder,
        ranks: Ranks,
        *,
        keep_last: int,
        keep_every: int | None,
        clip_value: float | None,
        best_of: Callable[[list[int]], int | None] = lambda steps: None,
    ) -> None:
        """Beside the last and every n-th it keeps the step that `best_of`, asked on the main rank, names of those there
        are."""
        self._run, self._ranks = run, ranks.with_own_group()
        self._keep_last, self._keep_every, self._clip_value = keep_last, keep_every, clip_value
        self._best_of = best_of
        self._pending: Future[None] | None = None
        self.committed_step: int | None = None
        """Step of the newest checkpoint that this writer committed."""
        self.failures_in_a_row = 0

    def save(self, tensors: dict[str, Tensor], step: int, progress: dict[str, Any], damage: str | None = None) -> None:
        """Starts to save; raises what the previous save ended with (see `finish`).

        Args:
            damage: why this rank's state must not be saved, if it is known already.
        """
        self.finish()
        # Half a second at the first save (it brings DTensor), so not at start-up; and in this thread, because of two
        # threads that import the same packages at once one may meet half a module.
        importlib.import_module("torch.distributed.checkpoint")
        # The one copy that the training thread pays for; contiguous, as safetensors has no strides.
        staged = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._pending = _in_daemon_thread(lambda: self._save(staged, step, progress, damage))

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
            IntegrityError: the state must not be saved; on all ranks.
            OSError: it could not be written; on all ranks. The previous checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _save(self, staged: dict[str, Tensor], step: int, progress: dict[str, Any], damage: str | None) -> None:
        ranks, final = self._ranks, self._run.checkpoint(step)
        temporary = final.with_suffix(".tmp")
        try:
            ranks.on_every_rank(lambda: self._check(staged, damage), EXPECTED)
            self._compare_replicas(staged)
            ranks.on_every_rank(lambda: self._make_anew(temporary) if ranks.is_main else None, EXPECTED)
            self._write_shards(staged, temporary)
            shares = ranks.on_every_rank(lambda: self._seal_shards(temporary), EXPECTED)
            files = {name: entry for share in shares for name, entry in share.items()}
            checkpoint = Checkpoint(final, FORMAT, step, ranks.world_size, progress, files)
            ranks.on_every_rank(lambda: self._commit(temporary, checkpoint) if ranks.is_main else None, EXPECTED)
            self.committed_step, self.failures_in_a_row = step, 0
        except BaseException:
            self.failures_in_a_row += 1
            if ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _make_anew(self, temporary: Path) -> None:
        if not self._run.config.exists():
            raise OSError(f"{self._run.path}: was moved or deleted while the run was going on")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _check(self, staged: dict[str, Tensor], damage: str | None) -> None:
        if damage is not None:
            raise IntegrityError(damage)
        for name, tensor in staged.items():
            if not torch.isfinite(tensor).all():
                raise IntegrityError(f"{name} holds a number that is not finite")
            if self._clip_value is None or name.endswith(SINGULAR_VECTORS):
                continue
            if name.startswith("critic."):
                largest = tensor.abs().max().item()
                # The clip rounds to the tensor's dtype.
                if largest > self._clip_value and not math.isclose(largest, self._clip_value, rel_tol=1e-6):
                    raise IntegrityError(f"{name} reaches {largest}, beyond the clip value {self._clip_value}")

    def _compare_replicas(self, staged: dict[str, Tensor]) -> None:
        digests = self._ranks.gather({name: sha256_of_tensor(tensor) for name, tensor in staged.items()})
        for name in staged:
            values = [digest.get(name) for digest in digests]
            [(usual, _)] = Counter(values).most_common(1)  # of two ranks, rank 0's
            if odd := [rank for rank, value in enumerate(values) if value != usual]:
                others = ", ".join(map(str, odd))
                raise IntegrityError(f"{name} differs between rank {values.index(usual)} and rank(s) {others}")

    def _write_shards(self, staged: dict[str, Tensor], temporary: Path) -> None:
        from torch.distributed.checkpoint.api import CheckpointException  # `save` has imported the package
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        # Saving without a process group is meant: a single process has none.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer, group = HuggingFaceStorageWriter(str(temporary), save_distributed=True), self._ranks.host_group
        try:
            save(staged, storage_writer=writer, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise OSError(f"{temporary}: {causes}") from None

    def _seal_shards(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Flushes and hashes the shards that this rank wrote."""
        entries = {}
        for path in sorted(temporary.glob(f"shard-{self._ranks.rank + 1:05d}-*")):
            fsync(path)
            entries[path.name] = {"num_bytes": path.stat().st_size, "sha256": _sha256_of_file(path)}
        return entries

    def _commit(self, temporary: Path, checkpoint: Checkpoint) -> None:
        manifest = {key: value for key, value in vars(checkpoint).items() if key != "folder"}
        path, final = temporary / MANIFEST, checkpoint.folder
        path.write_text(json.dumps(manifest | {"sha256": _sha256_of_json(manifest)}, indent=1))
        fsync(path)
        fsync(temporary)
        self._run.settle()
        if final.exists():
            # Only a damaged checkpoint is ever written again (a run resumes from the newest intact one).
            _remove(final)
        temporary.rename(final)
        fsync(final.parent)
        # Later ones are damaged (the run went on from before them) and take nobody's place.
        steps = [step for step in map(step_of, committed(self._run)) if step is not None and step <= checkpoint.step]
        best = self._best_of(steps)
        for step in steps[: -self._keep_last]:
            if step != best and (self._keep_every is None or step % self._keep_every):
                _remove(self._run.checkpoint(step))


def _in_daemon_thread(work: Callable[[], None]) -> Future[None]:
    """The outcome of `work`. No executor: its threads are joined when the process exits, so that after an error a save
    that waits for a lost rank would hold this one up until gloo gives up, half an hour later."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
            outcome.set_result(None)
        except BaseException as error:  # raised again by whoever asks for the result
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def _remove(folder: Path) -> None:
    """Takes the committed name away first, so that a half-removed folder is never taken for a checkpoint."""
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
    """Of the bytes of a tensor on the CPU, whatever its strides."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
