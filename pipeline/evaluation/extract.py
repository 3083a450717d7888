"""The images to score, and their features, which all ranks extract together.

Every rank renders a contiguous share of the images, batch by batch. Forward passes hold the same images for any number
of ranks, so the features of an image are the same in every bit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.data import Dataset
from pipeline.data.shards import Samples, decode, read_shard
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.progress import bar
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.interruption import check_interrupted, interruptible

ALONE = Ranks()
Consumer = Callable[[Tensor, Tensor, Tensor], None]
"""Takes features float32 [n, d], logits float32 [n, k] and the images' indices int64 [n]."""


@dataclass(frozen=True)
class ImageSet:
    """Images to score, which are read or generated a few at a time."""

    num_images: int
    render: Callable[[int, int], Tensor]
    """Returns images start, ..., stop - 1: uint8 [stop - start, C, H, W]. Image i must depend on i alone."""
    labels: Tensor | None = None
    """int64 [num_images], the classes that the images should show."""

    @classmethod
    def of_tensor(cls, images: Tensor, labels: Tensor | None = None) -> ImageSet:
        """Returns the set of images uint8 [n, C, H, W]."""
        return cls(len(images), lambda start, stop: images[start:stop], labels)

    @classmethod
    def of_split(cls, dataset: Dataset, split: str) -> ImageSet:
        """Returns a real split in the order of its shards. One shard is in memory at a time, so rendering in order
        reads each shard once. `render` raises DataError for a shard that is not what the manifest says."""
        shards = dataset.shards(split)
        starts = [0, *accumulate(shard.num_images for shard in shards)]
        in_memory: dict[int, Samples] = {}

        def part(number: int, start: int, stop: int) -> Tensor:
            if number not in in_memory:
                in_memory.clear()  # before the next shard is read
                in_memory[number] = read_shard(dataset, shards[number])
            rows = slice(max(start - starts[number], 0), stop - starts[number])
            pixels = decode(in_memory[number].images[rows], dataset.image_shape, dataset.locate(shards[number]))
            return torch.from_numpy(pixels)

        def render(start: int, stop: int) -> Tensor:
            numbers = range(bisect_right(starts, start) - 1, bisect_left(starts, stop))
            return torch.cat([part(number, start, stop) for number in numbers])

        return cls(starts[-1], render)


def extract_features(
    images: ImageSet,
    consumers: Sequence[tuple[FeatureExtractor, Consumer]],
    batch_size: int,
    title: str,
    ranks: Ranks,
    interrupted: Callable[[], bool],
) -> None:
    """Passes the features and logits of this rank's share of the images to the consumer of each extractor, batch by
    batch. Every rank must call it.

    Shares are cut at multiples of `batch_size`, a multiple of FORWARD_SIZE, so they may be empty. `title` is that of
    the progress bar. Raises Preempted or UserError on every rank, see `interruptible`, and ValueError for images that
    are not as ImageSet describes them.
    """
    share = ranks.share(images.num_images, batch_size)
    progress = bar(total=len(share), desc=title, unit=" images", leave=False, disable=not ranks.is_main)
    with interruptible(ranks, interrupted), progress:
        for start in share[::batch_size]:
            check_interrupted()
            indices = torch.arange(start, stop := min(start + batch_size, share.stop))
            batch = images.render(start, stop)
            if batch.dtype != torch.uint8 or len(batch) != len(indices):
                gave = f"{batch.dtype} {tuple(batch.shape)}"
                raise ValueError(f"render({start}, {stop}) gave {gave}, expected {len(indices)} images of torch.uint8")
            for extractor, consume in consumers:
                consume(*extractor(batch), indices)
            progress.update(len(batch))
