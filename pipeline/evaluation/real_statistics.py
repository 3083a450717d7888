"""Statistics of the real splits, kept beside the dataset so that only its first evaluation pays for them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchmetrics import MetricCollection

from pipeline.data.manifest import Dataset
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features, never
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.metrics import ClassScores, FrechetDistance, KernelDistance
from pipeline.evaluation.metrics.base import FeatureMetric, State
from pipeline.evaluation.metrics.frechet import Moments
from pipeline.rng import sampling_order
from pipeline.storage.files import write_tensors

logger = logging.getLogger(__name__)

FORMAT = "2"
"""Version of what the files hold; part of their key."""
BATCH_SIZE = 5 * FORWARD_SIZE


class RealStatistics(NamedTuple):
    """What evaluations take from a real split: one side of the metrics that they load it into."""

    moments: State
    """Of FrechetDistance."""
    sample: State
    """Of KernelDistance: features of at most KEEP images, and their indices in shard order."""
    classes: State
    """Of ClassScores; empty where the extractor's logits stand for no classes."""

    @property
    def num_images(self) -> int:
        return int(self.moments["count"])

    def moments_of(self, count: int) -> Moments:
        """Of the first `count` images in `rng.sampling_order`: of all that are kept, if those are fewer."""
        if count >= self.num_images:
            return Moments.of_sums(self.moments)
        return Moments.of_features(self.sample_of(count)["rows"])

    def sample_of(self, count: int) -> State:
        """Of these images, for one side of a SampleMetric."""
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
    key = hashlib.sha256(f"{FORMAT}:{dataset.fingerprint}:{split}:{extractor.fingerprint}".encode()).hexdigest()
    path = dataset.folder / "features" / f"{extractor.name}-{split}-{key[:16]}.safetensors"
    keep = not dataset.base_url  # a dataset behind a URL has no folder to write to
    kept = _read(path, key) if keep and ranks.is_main else None
    if ranks.broadcast(kept is not None):
        return kept
    metrics: dict[str, FeatureMetric] = {
        "moments": FrechetDistance(extractor.num_features),
        "sample": KernelDistance(extractor.num_features),
    }
    if extractor.class_names:
        metrics["classes"] = ClassScores(extractor.num_features, extractor.num_classes)
    collection = MetricCollection({**metrics})

    def take(features: Tensor, logits: Tensor, indices: Tensor) -> None:
        collection.update(features=features, logits=logits, real=True, indices=indices)

    title = f"{extractor.name} features of {split}"
    extract_features(ImageSet.of_split(dataset, split), [(extractor, take)], BATCH_SIZE, title, ranks, interrupted)
    for metric in metrics.values():
        metric.merge(ranks)
    if not ranks.is_main:
        return None
    real = RealStatistics(**{"classes": {}} | {name: metric.side(real=True) for name, metric in metrics.items()})
    if keep:
        _write(path, key, real)
    return real


def _read(path: Path, key: str) -> RealStatistics | None:
    """None when the file is missing or does not hold what was written, which is said in one line."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("key") != key or metadata.get("sha256") != _digest(tensors):
            raise ValueError("its checksum does not match")
        sides: dict[str, State] = {name: {} for name in RealStatistics._fields}
        for name, tensor in tensors.items():
            side, _, state = name.partition(".")
            sides[side][state] = tensor
        return RealStatistics(**sides)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        logger.warning("%s is damaged (%s): computing it again", path, error)
        return None


def _write(path: Path, key: str, real: RealStatistics) -> None:
    """Whole or not at all; when it can't be written, that is said in one line."""
    tensors = {f"{side}.{name}": tensor for side, state in real._asdict().items() for name, tensor in state.items()}
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
