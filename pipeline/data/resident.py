"""Splits and single images decoded into memory, and the source for every dataset that fits there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.data.dataset import Dataset
from pipeline.data.shards import copy_mirrored, decode, read_shard
from pipeline.data.source import Batch
from pipeline.distributed.collectives import Ranks
from pipeline.rng import data_indices

DRAWN_TOGETHER = 16
"""Batches gathered at once: on a GPU, launching a gather takes longer than the gather."""


def load_split(dataset: Dataset, split: str, *, mirror: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads all images of a split in shard order: uint8 [N, C, H, W] and labels int64 [N] (0 when unlabelled).

    `mirror` reverses both axes of each image. Raises DataError naming the first shard that is not exactly what the
    manifest says.
    """
    num_images = dataset.num_images(split)
    images = torch.empty(num_images, *dataset.image_shape, dtype=torch.uint8)
    labels = torch.zeros(num_images, dtype=torch.int64)
    start = 0
    for shard in dataset.shards(split):
        samples = read_shard(dataset, shard)
        stop = start + len(samples)
        stored = decode(samples.images, dataset.image_shape, dataset.locate(shard))
        into = images[start:stop].numpy()
        if mirror:
            copy_mirrored(stored, into)
        else:
            into[:] = stored
        if samples.labels is not None:
            labels[start:stop] = torch.from_numpy(samples.labels)
        start = stop
    return images, labels


def load_images(dataset: Dataset, split: str, indices: torch.Tensor) -> torch.Tensor:
    """Loads the images of a split at `indices` int64 [n] of its shard order: uint8 [n, C, H, W].

    Reads only the shards that hold them. Raises DataError as `load_split` does.
    """
    images = torch.empty(len(indices), *dataset.image_shape, dtype=torch.uint8)
    start = 0
    for shard in dataset.shards(split):
        here = (start <= indices) & (indices < start + shard.num_images)
        if here.any():
            stored = decode(read_shard(dataset, shard).images, dataset.image_shape, dataset.locate(shard))
            images[here] = torch.from_numpy(stored)[indices[here] - start]
        start += shard.num_images
    return images


class ResidentSource:
    """The train split in device memory. Batch k is `rng.data_indices(seed, k, ...)`: uniform with replacement."""

    def __init__(self, dataset: Dataset, *, batch_size: int, seed: int, ranks: Ranks, device: torch.device) -> None:
        self._batch_size, self._seed, self._rows = batch_size, seed, ranks.rows(batch_size)
        images, labels = load_split(dataset, "train", mirror=True)
        self._images, self._labels = images.to(device), labels.to(device)
        # Sums of what came out of verified shards, before anything could happen to it on the device.
        self._sums = sum_of(images), sum_of(labels)

    def batches(self, first: int) -> Iterator[Batch]:
        number = first
        while True:
            drawn = range(number, number + DRAWN_TOGETHER)
            rows = torch.stack(
                [data_indices(self._seed, k, self._batch_size, len(self._images))[self._rows] for k in drawn]
            )
            if self._images.is_cuda:
                rows = rows.pin_memory()  # or the copy would be staged
            rows = rows.to(self._images.device, non_blocking=True)
            yield from map(Batch, self._images[rows], self._labels[rows])
            number = drawn.stop

    def damage(self) -> str | None:
        """Compares the memory's sums with those at loading, and describes a difference."""
        if (sum_of(self._images), sum_of(self._labels)) == self._sums:
            return None
        return f"the training images in the memory of {self._images.device} are not those that were read; is it faulty?"


def sum_of(values: torch.Tensor) -> int:
    """Adds the bytes of a contiguous tensor as 64-bit numbers, modulo 2^64: any flipped bit changes the sum. It takes
    the time of reading the memory once."""
    content = values.view(-1).view(torch.uint8)
    whole = len(content) // 8 * 8
    return int(content[:whole].view(torch.int64).sum()) + int(content[whole:].sum())
