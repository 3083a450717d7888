"""Statistics and scores of the real splits, in files beside the dataset: only its first evaluation computes them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.data import Dataset
from pipeline.data.shards import read_shard
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor, digest_of
from pipeline.evaluation.interruption import check_interrupted, interruptible, never
from pipeline.evaluation.metrics.frechet import Moments
from pipeline.evaluation.metrics.scores import KEEP
from pipeline.evaluation.metrics.states import Batch, ClassSums, Sample, States, Sums, Tensors, add, gather
from pipeline.rng import sampling_order
from pipeline.storage.checkpoint import under
from pipeline.storage.files import read_tensors, write_tensors

logger = logging.getLogger(__name__)

FORMAT = "2"  # the version of what the files hold, part of their key
BATCH_SIZE = 5 * FORWARD_SIZE


class RealStatistics:
    """What evaluations compare with: sums over a real split, features of at most KEEP of its images with their indices
    in shard order, and sums within classes, empty if the extractor's logits are not of named classes."""

    def __init__(self, tensors: Tensors) -> None:
        """Takes the content of its file."""
        self.tensors = tensors
        self.moments, self.classes = Moments.of_sums(under(tensors, "moments")), under(tensors, "classes")
        self.sample, self.num_images = Sample.of_tensors(under(tensors, "sample"), KEEP), self.moments.num_images

    def moments_of(self, count: int) -> Moments:
        """Returns the moments of the first `count` images in `rng.sampling_order`, or of as many as the sample has."""
        if count >= self.num_images:
            return self.moments
        rows, indices = self.sample.first(count)
        return Moments.of_features(rows[sampling_order(indices).argsort()])


def real_statistics(
    dataset: Dataset,
    split: str,
    extractor: FeatureExtractor,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = never,
) -> RealStatistics | None:
    """Reads a real split's statistics, or computes them on all ranks, a shard at a time, and writes them. Every rank
    must call it; ranks other than the main one get None.

    A file that is missing or damaged is computed again. If it cannot be written, its content stays in memory.
    Concurrent runs may each compute and write it: it appears whole, and its content is the same up to the rounding of
    sums. Raises Preempted or UserError on every rank, see `interruptible`.
    """
    file = _File(dataset, extractor, split)
    stored = file.read() if ranks.is_main else None
    if ranks.broadcast(stored is not None):
        return RealStatistics(stored) if stored else None
    states: States = {"moments": Sums(extractor.num_features), "sample": Sample(extractor.num_features, KEEP)}
    if extractor.class_names:
        states["classes"] = ClassSums(extractor.num_features, extractor.num_classes)

    def consume(features: Tensor, logits: Tensor, indices: Tensor) -> None:
        add(states, Batch(features, logits, indices))

    title = f"{extractor.name} features of {split}"
    extract_features(ImageSet.of_split(dataset, split), [(extractor, consume)], BATCH_SIZE, title, ranks, interrupted)
    gather(states, ranks)
    if not ranks.is_main:
        return None
    tensors = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}
    file.write(tensors)
    return RealStatistics(tensors)


def class_sizes(
    dataset: Dataset,
    split: str,
    extractor: FeatureExtractor,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = never,
) -> list[int]:
    """Returns how many images of a real split each class has, on every rank; see `real_statistics`. The file is kept
    among those of `extractor`."""
    file = _File(dataset, extractor, f"class-sizes-{split}")
    stored = ranks.broadcast(file.read() if ranks.is_main else None)
    if stored is None:
        sizes = torch.zeros(dataset.num_classes, dtype=torch.int64)
        with interruptible(ranks, interrupted):
            for shard in dataset.shards(split)[ranks.rank :: ranks.world_size]:
                check_interrupted()
                sizes += torch.bincount(torch.as_tensor(read_shard(dataset, shard).labels), minlength=len(sizes))
        stored = {"sizes": torch.stack(ranks.gather(sizes)).sum(0)}
        if ranks.is_main:
            file.write(stored)
    return list(stored["sizes"].tolist())


def real_scores(
    dataset: Dataset,
    extractor: FeatureExtractor,
    facts: Mapping[str, object],
    compute: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Reads scores of real images, or numbers on the way to them, or computes and writes them, on the calling rank:
    JSON values that depend on the dataset, the extractor and `facts`."""
    file = _File(dataset, extractor, "-".join(f"{name}-{value}" for name, value in facts.items()))
    if stored := file.read():
        return dict(json.loads(stored["json"].numpy().tobytes()))
    values = compute()
    file.write({"json": torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)})
    return values


class _File:
    """A file of tensors beside a dataset. What cannot be written, as behind a URL, stays in this process's memory."""

    _unwritten: ClassVar[dict[Path, Tensors]] = {}

    def __init__(self, dataset: Dataset, extractor: FeatureExtractor, what: str) -> None:
        key = hashlib.sha256(f"{FORMAT}:{dataset.fingerprint}:{what}:{extractor.fingerprint}".encode()).hexdigest()
        self.key, self.has_place = key, not dataset.base_url
        self.path = dataset.folder / "features" / f"{extractor.name}-{what}-{key[:16]}.safetensors"

    def read(self) -> Tensors | None:
        """Returns the tensors; None if there are none, or the file does not hold what was written, which is logged."""
        if self.has_place and self.path.is_file():
            try:
                tensors, metadata = read_tensors(self.path)
                if metadata.get("key") == self.key and metadata.get("sha256") == digest_of(tensors):
                    return tensors
                raise ValueError("its checksum does not match")
            except (OSError, ValueError) as error:
                logger.warning("%s is damaged (%s): computing it again", self.path, error)
        return self._unwritten.get(self.path)

    def write(self, tensors: Tensors) -> None:
        """Writes the file whole; keeps the tensors in memory where there can be none, and logs a failure."""
        try:
            if self.has_place:
                write_tensors(self.path, tensors, {"key": self.key, "sha256": digest_of(tensors)})
                return
        except OSError as error:
            logger.warning("cannot keep the real statistics in %s (%s): going on without", self.path.parent, error)
        self._unwritten[self.path] = tensors
