"""Features of images, extracted by all ranks together and each image's the same in every bit for any number of them.

Every rank renders a contiguous share of the images, a batch at a time. Forward passes hold the same images whatever the
number of ranks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pipeline.data import Dataset
from pipeline.data.shards import Samples, decode, read_shard
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.progress import bar
from pipeline.errors import Preempted, UserError
from pipeline.evaluation.features import FeatureExtractor

ALONE = Ranks()
Taker = Callable[[Tensor, Tensor, Tensor], None]
"""Gets features float32 [n, d], logits float32 [n, k] and the images' indices int64 [n]."""


@dataclass(frozen=True)
class ImageSet:
    """Images to score, read or generated a few at a time."""

    num_images: int
    render: Callable[[int, int], Tensor]
    """(start, stop) -> these images, uint8 [stop - start, C, H, W]. Image i must depend on i alone."""
    labels: Tensor | None = None
    """int64 [num_images], the classes that the images were asked to show."""

    @classmethod
    def of_tensor(cls, images: Tensor, labels: Tensor | None = None) -> ImageSet:
        return cls(len(images), lambda start, stop: images[start:stop], labels)

    @classmethod
    def of_split(cls, dataset: Dataset, split: str) -> ImageSet:
        """A real split in shard order, read a shard at a time: cheap for those who go through it in order.

        `render` raises DataError naming a shard that is not exactly what the manifest says.
        """
        shards = dataset.shards(split)
        starts = [0, *accumulate(shard.num_images for shard in shards)]
        held: dict[int, Samples] = {}

        def part(number: int, start: int, stop: int) -> Tensor:
            if number not in held:
                held.clear()  # before the next one is read
                held[number] = read_shard(dataset, shards[number])
            rows = slice(max(start - starts[number], 0), stop - starts[number])
            stored = decode(held[number].images[rows], dataset.image_shape, dataset.locate(shards[number]))
            return torch.from_numpy(stored)

        def render(start: int, stop: int) -> Tensor:
            numbers = range(bisect_right(starts, start) - 1, bisect_left(starts, stop))
            return torch.cat([part(number, start, stop) for number in numbers])

        return cls(starts[-1], render)


def never() -> bool:
    return False


@contextmanager
def interruptible(ranks: Ranks, interrupted: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Yields a function to call now and then inside, which leaves the block when `interrupted()`. Once all ranks have
    left it, each raises Preempted if any was interrupted, or the UserError that any met, as of a damaged shard in its
    share."""

    def poll() -> None:
        if interrupted():
            raise Preempted

    ended: Preempted | UserError | None = None
    try:
        yield poll
    except (Preempted, UserError) as error:
        ended = error
    endings = ranks.gather(ended)
    for rank, ending in enumerate(endings):
        if isinstance(ending, UserError):
            raise type(ending)(f"rank {rank}: {ending}" if ranks.world_size > 1 else str(ending))
    if any(endings):
        raise Preempted("the evaluation was interrupted: start it again")


def extract_features(
    images: ImageSet,
    takers: Sequence[tuple[FeatureExtractor, Taker]],
    batch_size: int,
    title: str,
    ranks: Ranks,
    interrupted: Callable[[], bool],
) -> None:
    """Hands each extractor's features and logits of this rank's share of the images to its taker, batch by batch.
    Every rank must call it.

    Args:
        batch_size: images to render at once, a multiple of FORWARD_SIZE. Shares are cut at multiples of it, so they may
            differ by one batch and be empty.
        title: of the progress bar.
        interrupted: asked before each batch whether to give up; ranks may disagree for a while.

    Raises:
        Preempted: on every rank, when `interrupted` said so on any.
        UserError: on every rank, when rendering raised it on any.
    """
    share = ranks.share(images.num_images, batch_size)
    progress = bar(total=len(share), desc=title, unit=" images", leave=False, disable=not ranks.is_main)
    with interruptible(ranks, interrupted) as poll, progress:
        for start in share[::batch_size]:
            poll()
            indices = torch.arange(start, min(start + batch_size, share.stop))
            batch = images.render(start, start + len(indices))
            for extractor, take in takers:
                take(*extractor(batch), indices)
            progress.update(len(batch))
