"""What a source of real images is, which of the two a configuration means, and whether ranks and workers can share it.

A source is a function from batch numbers to batches: resident.py keeps a split in device memory, streaming.py reads it
again in every epoch. Both may be flipped at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.data.dataset import Dataset
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config, DataConfig
    from pipeline.distributed.collectives import Ranks


class Batch(NamedTuple):
    """This rank's rows of a global batch, on the source's device.

    The images are mirrored in both axes, as the networks see them: Keras's asymmetric 'same' padding is torch's
    symmetric one on mirrored images. A source mirrors each image once, when it is loaded; `load_split` and
    `load_images`, which serve evaluation and pictures, return images as they are stored.
    """

    images: torch.Tensor
    """uint8 [b, C, H, W], mirrored in H and W."""
    labels: torch.Tensor
    """int64 [b]; all 0 when unlabelled."""


class Source(Protocol):
    def batches(self, first: int) -> Iterator[Batch]:
        """Yields batches without end: item k is this rank's slice of global batch `first + k`, the same in every call.

        Close the iterator (or drop it) to release what it holds. Raises DataError for a damaged shard.
        """
        ...

    def damage(self) -> str | None:
        """Describes what has changed in images that are held in memory for the whole run; None: nothing has."""
        ...


class _FlippedSource:
    """Another source's batches with images flipped left to right, each at even odds.

    Whether row i of global batch k is flipped is a function of (seed, k, i), so it does not depend on the ranks, nor on
    where reading begins.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int, ranks: Ranks) -> None:
        self._source, self._batch_size, self._seed, self._rows = source, batch_size, seed, ranks.rows(batch_size)

    def batches(self, first: int) -> Iterator[Batch]:
        from pipeline.rng import horizontal_flips

        for number, (images, labels) in enumerate(self._source.batches(first), first):
            flips = horizontal_flips(self._seed, number, self._batch_size, self._rows)
            if images.is_cuda:
                flips = flips.pin_memory()  # or the copy would wait for the device
            flips = flips.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
            yield Batch(images.flip(3).where(flips, images), labels)

    def damage(self) -> str | None:
        return self._source.damage()


def open_source(config: Config, dataset: Dataset, ranks: Ranks, device: torch.device) -> Source:
    """Opens the train split for training as the configuration describes; evaluation reads images as they are instead.

    Raises UserError as `check_source` does, and DataError when a resident split has a damaged shard.
    """
    check_source(config, dataset, ranks.world_size)
    common: dict[str, Any] = {"batch_size": config.training.batch_size, "seed": config.training.seed, "ranks": ranks}
    source: Source
    if source_kind(config.data, dataset) == "resident":
        from pipeline.data.resident import ResidentSource

        source = ResidentSource(dataset, device=device, **common)
    else:
        from pipeline.data.streaming import StreamingSource

        lanes, workers = config.data.lanes, config.data.workers
        source = StreamingSource(dataset, lanes=lanes, workers=workers, device=device, **common)
    return _FlippedSource(source, **common) if config.data.horizontal_flip else source


def source_kind(config: DataConfig, dataset: Dataset) -> str:
    """Returns "resident" or "streaming": `auto` is resident when the decoded train split fits the configured limit."""
    if config.source != "auto":
        return config.source
    num_bytes = dataset.num_images("train") * prod(dataset.image_shape)
    return "resident" if num_bytes <= config.resident_limit_mib * 2**20 else "streaming"


def check_source(config: Config, dataset: Dataset | None, world_size: int) -> None:
    """Raises UserError when the batch is larger than the dataset, or cannot be shared among ranks, lanes and workers.

    Reads nothing. Without a dataset (one that will be prepared on first use) only the ranks are checked.
    """
    batch_size, lanes, workers = config.training.batch_size, config.data.lanes, config.data.workers
    if batch_size % world_size:
        raise UserError(
            f"training.batch_size {batch_size} cannot be shared among {world_size} processes: "
            "choose a batch size that the number of processes divides"
        )
    if dataset is not None and batch_size > (num_images := dataset.num_images("train")):
        text = f"training.batch_size {batch_size} is more than the {num_images} training images of {dataset.name}"
        raise UserError(f"{text}: lower it")
    if dataset is None or source_kind(config.data, dataset) == "resident":
        return
    streams = world_size * max(workers, 1)
    if batch_size % lanes or lanes % streams:
        raise UserError(
            f"data.lanes {lanes} cannot be shared evenly at world size {world_size}, data.workers {workers}: choose "
            f"a multiple of {streams} that divides training.batch_size {batch_size}"
        )
