"""The scores of samples of features, in one table: another one is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.evaluation.metrics.authenticity import authenticity
from pipeline.evaluation.metrics.kernel import kernel_distance
from pipeline.evaluation.metrics.manifold import NEIGHBOURS, manifold_scores
from pipeline.evaluation.metrics.sliced import sliced_wasserstein
from pipeline.evaluation.metrics.states import Poll, Sample, never_ends

KEEP = 50_000
"""Most images of a side whose features are kept."""


class Options(NamedTuple):
    """What scores of samples depend on besides the samples."""

    seed: int = 0
    """Of subsets, splits and projections."""
    neighbours: int = NEIGHBOURS
    """The k of precision and what is like it."""
    poll: Poll = never_ends
    real_radii: Callable[[Tensor], Tensor] | None = None
    """Looks up the `squared_radii` of a real sample [n, d] where they are kept."""


@dataclass(frozen=True)
class SampleScore:
    """A score of features [m, d] of generated and [n, d] of real images."""

    names: tuple[str, ...]
    function: Callable[[Tensor, Tensor, Options], Sequence[float]]
    """Gives a number for each name."""
    most_fake: int = KEEP
    """Most generated images that it takes."""
    equal: bool = False
    """As many real images as generated ones, so that scores of different evaluations of N images compare."""
    against_training: bool = False
    """The real images are the training split, whatever the reference is."""
    least: tuple[int, int] = (2, 2)
    """Fewest generated and real images that give a score."""

    def __call__(self, fake: Sample, real: Sample, options: Options) -> tuple[dict[str, float], list[int]]:
        """Returns the scores by name, NaN of too few images, and how many generated and real images they are of."""
        most = min(fake.seen, fake.keep, self.most_fake)
        count = min(most, real.seen, real.keep) if self.equal else most
        numbers = [count, count if self.equal else min(real.seen, real.keep)]
        if any(number < least for number, least in zip(numbers, self.least, strict=True)):
            return dict.fromkeys(self.names, torch.nan), numbers
        rows = fake.first(count)[0], real.first(count)[0] if self.equal else real.first()[0]
        return dict(zip(self.names, self.function(*rows, options), strict=True)), numbers


def _manifold(fake: Tensor, real: Tensor, how: Options) -> Sequence[float]:
    if len(fake) <= how.neighbours:  # and as many real ones
        return [torch.nan] * 4
    radii = how.real_radii and how.real_radii(real)
    return list(manifold_scores(fake, real, how.neighbours, how.poll, radii).values())


SAMPLE_SCORES = {
    "kid": SampleScore(("kid_mean", "kid_std"), lambda x, y, how: kernel_distance(x, y, how.seed, how.poll)),
    "manifold": SampleScore(("precision", "recall", "density", "coverage"), _manifold, 10_000, equal=True),
    "sliced_wasserstein": SampleScore(
        ("sliced_wasserstein",),
        lambda x, y, how: [sliced_wasserstein(x, y, how.seed, how.poll)],
        *(10_000, True),
        least=(1, 1),
    ),
    "authenticity": SampleScore(
        ("authenticity",),
        lambda x, y, how: [authenticity(x, y, how.poll)],
        1_000,
        against_training=True,
        least=(1, 2),
    ),
}
