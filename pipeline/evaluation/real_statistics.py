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
    """Features float32 [N, d] and logits float32 [N, k] of a real split in its order, and the features' moments."""

    features: Tensor
    logits: Tensor
    moments: Moments


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
    # A dataset behind a URL has no folder to write to.
    path = (
        None if dataset.base_url else dataset.folder / "features" / f"{extractor.name}-{split}-{key[:16]}.safetensors"
    )
    kept = _read(path, key) if ranks.is_main and path is not None else None
    if ranks.broadcast(kept is not None):
        return kept
    images = ImageSet.of_tensor(load_split(dataset, split)[0])
    title = f"{extractor.name} features of {split}"
    found = extract_features(images, [extractor], FORWARD_SIZE, title, ranks, interrupted)
    if found is None:
        return None
    features, logits = found[0]
    real = RealFeatures(features, logits, moments(features))
    if path is not None:
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
        real = Moments(tensors["mean"], tensors["covariance"], len(tensors["features"]))
        return RealFeatures(tensors["features"], tensors["logits"], real)
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s): computing it again", path, error)
        return None


def _write(path: Path, key: str, real: RealFeatures) -> None:
    """Whole or not at all; that it can't be written is said in one line."""
    tensors = {
        "features": real.features,
        "logits": real.logits,
        "mean": real.moments.mean,
        "covariance": real.moments.covariance,
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"key": key, "sha256": _digest(tensors)})
            temporary.chmod(0o644)  # safetensors makes it readable by its owner alone
    except (OSError, SafetensorError) as error:
        logger.warning("cannot keep the real features in %s (%s): going on without", path.parent, error)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
