"""Features of the real splits, kept beside the dataset so that only its first evaluation pays for them."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data.manifest import Dataset
from pipeline.data.resident import load_split
from pipeline.metrics.features import FORWARD_SIZE, FeatureExtractor
from pipeline.metrics.scores import Moments, moments
from pipeline.progress import bar

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = "1"
"""Version of what the files hold; part of their key."""


@dataclass(frozen=True)
class RealFeatures:
    """Features float32 [N, d] and logits float32 [N, k] of a real split in its order, and the features' moments."""

    features: Tensor
    logits: Tensor
    moments: Moments


class Interrupted(Exception):
    """Some rank was told to stop; raised on all ranks together, before the next collective."""


def real_features(
    dataset: Dataset,
    split: str,
    extractor: FeatureExtractor,
    *,
    rank: int,
    world_size: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> RealFeatures | None:
    """A real split's features, from the cache or computed by all ranks in shares: on rank 0, None on the others.

    Every rank must call it. A missing or damaged file is computed again (damage is told in one line); when it cannot be
    written the evaluation goes on without it. Concurrent runs may each compute and write it: the file appears whole
    or not at all, and its content is the same. Raises Interrupted when `interrupted` says so on any rank.
    """
    key = hashlib.sha256(f"{FORMAT}:{dataset.fingerprint}:{split}:{extractor.fingerprint}".encode()).hexdigest()
    # A dataset behind a URL has no folder to write to.
    path = (
        None if dataset.base_url else dataset.folder / "features" / f"{extractor.name}-{split}-{key[:16]}.safetensors"
    )
    found = _read(path, key) if rank == 0 and path is not None else None
    if broadcast(found is not None, world_size):
        return found
    images, _ = load_split(dataset, split)
    start, stop = share(len(images), FORWARD_SIZE, rank, world_size)
    parts = []
    stopping = False
    with bar(
        total=stop - start, desc=f"{extractor.name} features of {split}", unit=" images", leave=False, disable=rank != 0
    ) as progress:
        for part in torch.split(images[start:stop], FORWARD_SIZE):
            if stopping := interrupted():
                break
            if len(part):
                parts.append(extractor(part))
            progress.update(len(part))
    raise_if_any(stopping, world_size)
    gathered = gather(stacked(parts, extractor), rank, world_size)
    if gathered is None:
        return None
    features, logits = gathered
    real = RealFeatures(features, logits, moments(features))
    if path is not None:
        _write(path, key, real)
    return real


def share(count: int, unit: int, rank: int, world_size: int) -> tuple[int, int]:
    """This rank's contiguous part of range(count), cut at multiples of `unit`; it may be empty."""
    num_units = -(-count // unit)
    first, last = num_units * rank // world_size, num_units * (rank + 1) // world_size
    return min(first * unit, count), min(last * unit, count)


def raise_if_any(stopping: bool, world_size: int) -> None:
    """Raises Interrupted on every rank if any rank is stopping."""
    flags = [stopping] * world_size
    if world_size > 1:
        dist.all_gather_object(flags, stopping)
    if any(flags):
        raise Interrupted


def stacked(parts: list[tuple[Tensor, Tensor]], extractor: FeatureExtractor) -> tuple[Tensor, Tensor]:
    """The parts in one: features [n, d] and logits [n, k], with n = 0 for no parts."""
    empty = torch.empty(0, extractor.num_features), torch.empty(0, extractor.num_classes)
    features, logits = zip(empty, *parts, strict=True)
    return torch.cat(features), torch.cat(logits)


def gather(tensors: tuple[Tensor, Tensor], rank: int, world_size: int) -> tuple[Tensor, Tensor] | None:
    """The ranks' CPU tensors one after another, on rank 0; None elsewhere. Shares may differ in length."""
    if world_size == 1:
        return tensors
    received: list[tuple[Tensor, Tensor]] | None = [tensors] * world_size if rank == 0 else None
    dist.gather_object(tensors, received)
    if received is None:
        return None
    features, logits = zip(*received, strict=True)
    return torch.cat(features), torch.cat(logits)


def broadcast(value: T, world_size: int) -> T:
    """Rank 0's value on every rank."""
    if world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _read(path: Path, key: str) -> RealFeatures | None:
    """None when the file is missing or does not hold what was written, which is said in one line."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("key") != key or metadata.get("sha256") != _digest(tensors):
            raise ValueError("its checksum does not match")
        real = Moments(tensors["mean"], tensors["covariance"], len(tensors["features"]))
        return RealFeatures(tensors["features"], tensors["logits"], real)
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s): computing it again", path, error)
        return None


def _write(path: Path, key: str, real: RealFeatures) -> None:
    """Whole or not at all: written under a name of its own, then renamed."""
    tensors = {
        "features": real.features,
        "logits": real.logits,
        "mean": real.moments.mean,
        "covariance": real.moments.covariance,
    }
    temporary: str | None = None
    try:
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, {"key": key, "sha256": _digest(tensors)})
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        logger.warning("cannot keep the real features in %s (%s): going on without", path.parent, error)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
