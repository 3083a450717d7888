"""The scores as `torchmetrics.Metric`s over features or logits of any network, for training loops outside this package.

The formulae are functions in frechet.py, neighbours.py and scores.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.metrics.frechet import Moments, frechet_distance
from pipeline.evaluation.metrics.neighbours import NEIGHBOURS
from pipeline.evaluation.metrics.scores import KEEP, SAMPLE_SCORES, ClassScore, Options, class_scores
from pipeline.evaluation.metrics.states import Batch, ClassSums, Sample, States, Sums, add, gather


class FeatureMetric(Metric):
    """A score of generated images (`real=False`) against real ones: `score`, a function of the states of both sides.

    `compute` returns float64 tensors, NaN for too few images. In a job of several ranks it is the score of all ranks'
    images, even if some ranks have none. torchmetrics does not know the states (`states`: those of a side, empty, by
    name): it would round them when the metric is moved to another type. They stay on the CPU.
    """

    is_differentiable = False
    full_state_update = True

    def __init__(self, states: States, **options: Any) -> None:
        super().__init__(**options)
        self._empty = states
        self.fake, self.real = copy.deepcopy(states), copy.deepcopy(states)

    def score(self, fake: States, real: States) -> Any:
        """Returns the score of these states: a number, or numbers and tensors by name."""
        raise NotImplementedError

    def update(
        self,
        features: Tensor | None = None,
        real: bool = False,
        indices: Tensor | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Adds the images of a `states.Batch` to one side; by default they are numbered as they come. Raises ValueError
        for rows of another width or another number of indices."""
        add(self.real if real else self.fake, Batch(features, logits, indices, labels))

    def compute(self) -> Any:
        return self._score_of(Ranks.without_group() if self.sync_on_compute else Ranks())

    def _score_of(self, ranks: Ranks) -> Any:
        sides = [{name: copy.copy(state) for name, state in side.items()} for side in (self.fake, self.real)]
        for side in sides:
            gather(side, ranks)  # the copies: this rank's own states go on
        scores = self.score(*sides)
        if isinstance(scores, dict):
            return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in scores.items()}
        return torch.as_tensor(scores, dtype=torch.float64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns the score of this rank's batch alone."""
        self.update(*args, **kwargs)
        batch = copy.deepcopy(self)
        batch.reset()
        batch.update(*args, **kwargs)
        return batch._score_of(Ranks())

    def reset(self) -> None:
        super().reset()
        self.fake, self.real = copy.deepcopy(self._empty), copy.deepcopy(self._empty)


class FrechetDistance(FeatureMetric):
    """FID of all images; NaN with fewer than two images of a side."""

    higher_is_better = False

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__({"sums": Sums(num_features)}, **options)

    def score(self, fake: States, real: States) -> float:
        sides = [side["sums"].tensors for side in (fake, real)]
        return frechet_distance(*map(Moments.of_sums, sides)) if min(side["count"] for side in sides) > 1 else torch.nan


class SampleMetric(FeatureMetric):
    """The score `name` of SAMPLE_SCORES, of at most `keep` images of either side and at most `scored` generated ones
    (by default as many as that table says); NaN for too few. `seed` and `neighbours` are those of `scores.Options`."""

    name: str

    def __init__(
        self,
        num_features: int,
        *,
        keep: int = 0,
        scored: int = 0,
        seed: int = 0,
        neighbours: int = NEIGHBOURS,
        **options: Any,
    ) -> None:
        score = SAMPLE_SCORES[self.name]
        keep = keep or (score.most_fake if score.equal else KEEP)
        super().__init__({score.rows: Sample(num_features, keep, score.rows)}, **options)
        self.most_fake = scored or (keep if score.equal else score.most_fake)
        self.options = Options(seed, neighbours)

    def score(self, fake: States, real: States) -> dict[str, float]:
        score = SAMPLE_SCORES[self.name]
        return score(fake[score.rows], real[score.rows], self.options, self.most_fake)[0]


class KernelDistance(SampleMetric):
    """KID: "kid_mean" and "kid_std"."""

    name, higher_is_better = "kid", False


class ManifoldScores(SampleMetric):
    """ "precision", "recall", "density" and "coverage", of equally many images of either side."""

    name, higher_is_better = "manifold", True


class SlicedWasserstein(SampleMetric):
    """ "sliced_wasserstein", of equally many images of either side."""

    name, higher_is_better = "sliced_wasserstein", False


class Authenticity(SampleMetric):
    """ "authenticity" of 1,000 generated images, or `scored`, among the training images, which are the real side."""

    name, higher_is_better = "authenticity", True


class InceptionScore(SampleMetric):
    """ "is_mean" and "is_std" of the logits of generated images; real ones are ignored."""

    name, higher_is_better = "inception_score", True

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)

    def update(self, logits: Tensor, real: bool = False, indices: Tensor | None = None) -> None:  # type: ignore[override]
        """Adds logits [n, num_classes] of the images with these indices."""
        if not real:
            super().update(None, real, indices, logits)


class ClassScores(FeatureMetric):
    """The result of `scores.class_scores`."""

    def __init__(self, num_features: int, num_classes: int, **options: Any) -> None:
        super().__init__({"classes": ClassSums(num_features, num_classes)}, **options)

    def score(self, fake: States, real: States) -> dict[str, ClassScore]:
        return class_scores(fake["classes"].tensors, real["classes"].tensors)
