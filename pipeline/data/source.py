"""The one interface of the real images: a source is a function from batch numbers to batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch


class Batch(NamedTuple):
    """This rank's rows of a global batch, on the source's device."""

    images: torch.Tensor
    """uint8 [b, C, H, W]."""
    labels: torch.Tensor
    """int64 [b]; all 0 when unlabelled."""


class Source(Protocol):
    def batches(self, first: int) -> Iterator[Batch]:
        """Endless: item k is this rank's slice of global batch `first + k`, the same whenever it is asked for.

        Close the iterator (or drop it) to release what it holds. Raises DataError for a damaged shard.
        """
        ...
