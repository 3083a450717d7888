"""The images to score, their features, which all ranks extract together, and how a signal ends that on all of them.

Every rank renders a contiguous share of the images, batch by batch. Forward passes hold the same images for any number
of ranks, so the features of an image are the same in every bit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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


def never() -> bool:
    """The `interrupted` of an evaluation that runs to its end."""
    return False


_interrupted: ContextVar[Callable[[], bool]] = ContextVar("interrupted", default=never)


def check_interrupted() -> None:
    """Raises Preempted in an `interruptible` block that is to end; does nothing elsewhere.

    Scores call it between the parts of a long computation, some seconds apart.
    """
    if _interrupted.get()():
        raise Preempted


@contextmanager
def interruptible(ranks: Ranks, interrupted: Callable[[], bool]) -> Iterator[None]:
    """Runs a block that every rank enters, which `check_interrupted` leaves on the ranks where `interrupted()` is true.

    A rank waits at the end of the block for the others.

    Raises:
        UserError: On every rank, if the block raised it on any, such as for a damaged shard in that rank's share.
        Preempted: On every rank, if any was interrupted.
    """
    token = _interrupted.set(interrupted)
    failure: Preempted | UserError | None = None
    try:
        yield
    except (Preempted, UserError) as error:
        failure = error
    finally:
        _interrupted.reset(token)
    failures = ranks.gather(failure)
    for rank, other in enumerate(failures):
        if isinstance(other, UserError):
            raise type(other)(f"rank {rank}: {other}" if ranks.world_size > 1 else str(other))
    if any(failures):
        raise Preempted("the evaluation was interrupted: start it again")


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
    the progress bar. Raises Preempted or UserError on every rank, see `interruptible`.
    """
    share = ranks.share(images.num_images, batch_size)
    progress = bar(total=len(share), desc=title, unit=" images", leave=False, disable=not ranks.is_main)
    with interruptible(ranks, interrupted), progress:
        for start in share[::batch_size]:
            check_interrupted()
            indices = torch.arange(start, min(start + batch_size, share.stop))
            batch = images.render(start, start + len(indices))
            for extractor, consume in consumers:
                consume(*extractor(batch), indices)
            progress.update(len(batch))
