"""Features of images, extracted by all ranks together and the same in every bit for any number of them.

Every rank renders a contiguous share of the images; their features are gathered in the images' order. Forward passes
hold the same images whatever the number of ranks, and nothing is summed in an order that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed.collectives import Ranks
from pipeline.errors import Preempted
from pipeline.evaluation.features import FeatureExtractor
from pipeline.progress import bar

ALONE = Ranks()


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


def never() -> bool:
    return False


@contextmanager
def interruptible(ranks: Ranks, interrupted: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Yields a function to call now and then inside, which leaves the block when `interrupted()`. Once all ranks have
    left it, each raises Preempted if any was interrupted."""

    def poll() -> None:
        if interrupted():
            raise Preempted

    stopping = False
    try:
        yield poll
    except Preempted:
        stopping = True
    if ranks.any(stopping):
        raise Preempted("the evaluation was interrupted: start it again")


def extract_features(
    images: ImageSet,
    extractors: Sequence[FeatureExtractor],
    batch_size: int,
    title: str,
    ranks: Ranks,
    interrupted: Callable[[], bool],
) -> list[tuple[Tensor, Tensor]] | None:
    """For each extractor features float32 [N, d] and logits float32 [N, k] of all images: on the main rank, None on the
    others. Every rank must call it.

    Args:
        batch_size: images to render at once, a multiple of FORWARD_SIZE. Shares are cut at multiples of it, so they may
            differ by one batch and be empty.
        title: of the progress bar.
        interrupted: asked before each batch whether to give up; ranks may disagree for a while.

    Raises:
        Preempted: on every rank, when `interrupted` said so on any.
    """
    share = ranks.share(images.num_images, batch_size)
    parts = [[(torch.empty(0, space.num_features), torch.empty(0, space.num_classes))] for space in extractors]
    progress = bar(total=len(share), desc=title, unit=" images", leave=False, disable=not ranks.is_main)
    with interruptible(ranks, interrupted) as poll, progress:
        for start in share[::batch_size]:
            poll()
            batch = images.render(start, min(start + batch_size, share.stop))
            for extractor, extracted in zip(extractors, parts, strict=True):
                extracted.append(extractor(batch))
            progress.update(len(batch))
    gathered = ranks.gather_on_main([_joined(extracted) for extracted in parts])
    return None if gathered is None else [_joined(shares) for shares in zip(*gathered, strict=True)]


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(logits)
