"""Mirroring as augmentation: any source, its images flipped left to right or not, at even odds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.data.source import Batch, Source
from pipeline.distributed.collectives import Ranks
from pipeline.rng import horizontal_flips


class FlippedSource:
    """Another source's batches. Row i of global batch k is flipped as a function of (seed, k, i), which are also what
    says which image it is: so of any (epoch, index), whoever reads it and whenever."""

    def __init__(self, source: Source, *, batch_size: int, seed: int, ranks: Ranks) -> None:
        self._source, self._batch_size, self._seed, self._rows = source, batch_size, seed, ranks.rows(batch_size)

    def batches(self, first: int) -> Iterator[Batch]:
        for number, (images, labels) in enumerate(self._source.batches(first), first):
            flips = horizontal_flips(self._seed, number, self._batch_size, self._rows)
            if images.is_cuda:
                flips = flips.pin_memory()  # or the copy would wait for the device
            flips = flips.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
            yield Batch(torch.where(flips, images.flip(3), images), labels)

    def damage(self) -> str | None:
        return self._source.damage()
