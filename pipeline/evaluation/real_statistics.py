"""Features of the real splits, kept beside the dataset so that only its first evaluation pays for them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data.manifest import Dataset
from pipeline.data.resident import load_split
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features, never
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.scores import Moments, moments
from pipeline.storage.files import replacing

logger = logging.getLogger(__name__)

FORMAT = "1"
"""Version of what the files hold; part of their key."""


@dataclass(frozen=True)
class RealFeatures:
    """Of a real split in its order, as the file keeps them."""

    features: Tensor
    """float32 [N, d]."""
    logits: Tensor
    """float32 [N, k]."""
    mean: Tensor
    covariance: Tensor

    @property
    def moments(self) -> Moments:
        return Moments(self.mean, self.covariance, len(self.features))


def real_features(
    dataset: Dataset,
    split: str,
    extractor: FeatureExtractor,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = never,
) -> RealFeatures | None:
    """A real split's features, kept or computed by all ranks in shares: on the main rank, None on the others.

    Every rank must call it. A missing or damaged file is computed again (damage is told in one line); when it cannot be
    written the evaluation goes on without it. Concurrent runs may each compute and write it: the file appears whole
    or not at all, and its content is the same. Raises Preempted when `interrupted` says so on any rank.
    """
    key = hashlib.sha256(f"{FORMAT}:{dataset.fingerprint}:{split}:{extractor.fingerprint}".encode()).hexdigest()
    path = dataset.folder / "features" / f"{extractor.name}-{split}-{key[:16]}.safetensors"
    keep = not dataset.base_url  # a dataset behind a URL has no folder to write to
    kept = _read(path, key) if keep and ranks.is_main else None
    if ranks.broadcast(kept is not None):
        return kept
    images, _ = load_split(dataset, split)
    title = f"{extractor.name} features of {split}"
    found = extract_features(ImageSet.of_tensor(images), [extractor], FORWARD_SIZE, title, ranks, interrupted)
    if found is None:
        return None
    computed = moments(found[0][0])
    real = RealFeatures(*found[0], computed.mean, computed.covariance)
    if keep:
        _write(path, key, real)
    return real


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
        return RealFeatures(**tensors)
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s): computing it again", path, error)
        return None


def _write(path: Path, key: str, real: RealFeatures) -> None:
    """Whole or not at all; when it can't be written, that is said in one line."""
    try:
        with replacing(path) as temporary:
            save_file(vars(real), temporary, {"key": key, "sha256": _digest(vars(real))})
    except (OSError, SafetensorError) as error:
        logger.warning("cannot keep the real features in %s (%s): going on without", path.parent, error)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
