"""Statistics and scores of the real splits, kept beside the dataset so that only its first evaluation pays for them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.data import Dataset
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features, never
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.metrics.frechet import Moments
from pipeline.evaluation.metrics.metric import FeatureMetric
from pipeline.evaluation.metrics.scores import KEEP
from pipeline.evaluation.metrics.states import ClassSums, Sample, State, Sums
from pipeline.rng import sampling_order
from pipeline.storage.files import write_tensors

logger = logging.getLogger(__name__)

FORMAT = "2"
"""Version of what the files hold; part of their key."""
BATCH_SIZE = 5 * FORWARD_SIZE


class RealStatistics(NamedTuple):
    """The states of a real split (metrics/states.py) that evaluations compare with."""

    moments: State
    """Its sums."""
    sample: State
    """Features of at most KEEP images, and their indices in shard order."""
    classes: State
    """Its sums within classes; empty where the extractor's logits stand for no classes."""

    @property
    def num_images(self) -> int:
        return int(self.moments["count"])

    def moments_of(self, count: int) -> Moments:
        """Of the first `count` images in `rng.sampling_order`: of all that are kept, if those are fewer."""
        if count >= self.num_images:
            return Moments.of_sums(self.moments)
        return Moments.of_features(self.sample_of(count)["rows"])

    def sample_of(self, count: int) -> State:
        """Of these images, as the state of a sample."""
        first = sampling_order(self.sample["indices"]).argsort()[:count]
        return {name: self.sample[name][first] for name in ("rows", "indices")} | {"seen": torch.tensor(len(first))}


def real_statistics(
    dataset: Dataset,
    split: str,
    extractor: FeatureExtractor,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = never,
) -> RealStatistics | None:
    """A real split's statistics, kept or computed by all ranks in shares: on the main rank, None on the others.

    Every rank must call it. A missing or damaged file is computed again (damage is told in one line); when it cannot be
    written the evaluation goes on without it. Concurrent runs may each compute and write it: the file appears whole
    or not at all, and its content is the same but for the rounding of sums. No rank holds more than a shard of images.
    Raises Preempted when `interrupted` says so on any rank.
    """
    key, path = _place(dataset, extractor, split)
    keep = not dataset.base_url  # a dataset behind a URL has no folder to write to
    kept = _read(path, key) if keep and ranks.is_main else None
    if ranks.broadcast(kept is not None):
        return _sides(kept) if kept else None
    states: dict[str, Any] = {"moments": Sums(extractor.num_features), "sample": Sample(extractor.num_features, KEEP)}
    if extractor.class_names:
        states["classes"] = ClassSums(extractor.num_features, extractor.num_classes)
    metric = FeatureMetric(states)

    def take(features: Tensor, logits: Tensor, indices: Tensor) -> None:
        metric.update(features, True, indices, logits)

    title = f"{extractor.name} features of {split}"
    extract_features(ImageSet.of_split(dataset, split), [(extractor, take)], BATCH_SIZE, title, ranks, interrupted)
    metric.merge(ranks)
    if not ranks.is_main:
        return None
    real = RealStatistics(**{"classes": {}} | {name: state.state() for name, state in metric.real.items()})
    if keep:
        sides = real._asdict().items()
        _write(path, key, {f"{side}.{name}": tensor for side, state in sides for name, tensor in state.items()})
    return real


def real_scores(
    dataset: Dataset,
    extractor: FeatureExtractor,
    facts: Mapping[str, object],
    compute: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Scores of real images, or numbers on the way to them, kept or computed, on the calling rank: JSON, determined by
    dataset, extractor and `facts`. Files are missing, damaged or not written as those of `real_statistics`."""
    if dataset.base_url:
        return compute()
    key, path = _place(dataset, extractor, "-".join(f"{name}-{value}" for name, value in facts.items()))
    if kept := _read(path, key):
        return dict(json.loads(kept["json"].numpy().tobytes()))
    found = compute()
    _write(path, key, {"json": torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)})
    return found


def _place(dataset: Dataset, extractor: FeatureExtractor, what: str) -> tuple[str, Path]:
    """The key of what is kept, and its file."""
    key = hashlib.sha256(f"{FORMAT}:{dataset.fingerprint}:{what}:{extractor.fingerprint}".encode()).hexdigest()
    return key, dataset.folder / "features" / f"{extractor.name}-{what}-{key[:16]}.safetensors"


def _sides(tensors: Mapping[str, Tensor]) -> RealStatistics:
    sides: dict[str, State] = {name: {} for name in RealStatistics._fields}
    for name, tensor in tensors.items():
        side, _, state = name.partition(".")
        sides[side][state] = tensor
    return RealStatistics(**sides)


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """None when the file is missing or does not hold what was written, which is said in one line."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("key") != key or metadata.get("sha256") != _digest(tensors):
            raise ValueError("its checksum does not match")
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s): computing it again", path, error)
        return None
    return tensors


def _write(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all; when it can't be written, that is said in one line."""
    try:
        write_tensors(path, tensors, {"key": key, "sha256": _digest(tensors)})
    except OSError as error:
        logger.warning("cannot keep the real statistics in %s (%s): going on without", path.parent, error)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
