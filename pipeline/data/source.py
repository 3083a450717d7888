"""The one interface of the real images: a source is a function from batch numbers to batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Batch(NamedTuple):
    """This rank's rows of a global batch, on the source's device.

    The images are mirrored in both axes, as the networks see them: Keras's asymmetric 'same' padding is torch's
    symmetric one on mirrored images. A source mirrors each image once, when it is loaded; `load_split` and
    `load_images`, which serve evaluation and pictures, give images as they are stored.
    """

    images: Tensor
    """uint8 [b, C, H, W], mirrored in H and W."""
    labels: Tensor
    """int64 [b]; all 0 when unlabelled."""


class Source(Protocol):
    def batches(self, first: int) -> Iterator[Batch]:
        """Endless: item k is this rank's slice of global batch `first + k`, the same whenever it is asked for.

        Close the iterator (or drop it) to release what it holds. Raises DataError for a damaged shard.
        """
        ...

    def damage(self) -> str | None:
        """What has become of the images that are held in memory for the whole run, in words; None: nothing."""
        ...
