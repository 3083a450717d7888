"""One `torchmetrics.Metric` for all scores of features: it keeps states of both sides, over batches and ranks, and
gives them to a function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.metrics.states import Batch

States = dict[str, Any]
"""The states of one side (states.py) by name."""


class FeatureMetric(Metric):
    """A score of generated images (`real=False`) against real ones, from features that anybody computed.

    `compute` returns float64 tensors, NaN where so few images give no score. In a job of several ranks it is the score
    of all ranks' images, also where a rank has none. States are float64 or as the networks gave them, on the CPU:
    moving the metric to a device or to another type leaves them alone, which torchmetrics' own states would be rounded
    by.

    Args:
        states: the states of a side, empty, by name.
        options: torchmetrics' own.
    """

    is_differentiable = False
    full_state_update = True

    def __init__(self, states: States, **options: Any) -> None:
        super().__init__(**options)
        self._empty = states
        self.fake, self.real = copy.deepcopy(states), copy.deepcopy(states)

    def score(self, fake: States, real: States) -> Any:
        """Returns the score of these states of generated and real images: a number, or numbers and tensors by name."""
        raise NotImplementedError

    def update(
        self,
        features: Tensor | None = None,
        real: bool = False,
        indices: Tensor | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Takes features [n, d], logits [n, k] and the classes asked for, int64 [n], of the images with these indices
        int64 [n], which no two images of a side share: what its states keep of these. n may be 0.

        Raises:
            ValueError: rows of another width, or another number of indices.
        """
        for state in (self.real if real else self.fake).values():
            state.add(Batch(features, logits, indices, labels))

    def compute(self) -> Any:
        scores = self.score(self.fake, self.real)
        if isinstance(scores, dict):
            return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in scores.items()}
        return torch.as_tensor(scores, dtype=torch.float64)

    def merge(self, ranks: Ranks) -> None:
        """Gives every rank the states of all from here on; `compute` must not ask again (`sync_on_compute=False`)."""
        for state in (*self.fake.values(), *self.real.values()):
            state.gather(ranks)

    # -- what torchmetrics does with states that it knows --------------------------------------------------------------

    @contextmanager
    def sync_context(self, *_: Any, should_sync: bool = True, **__: Any) -> Iterator[None]:
        """Puts the states of all ranks in the place of this one's during a `compute`."""
        ranks = Ranks.silent()
        if not should_sync or ranks.world_size == 1:
            yield
            return
        mine = self.fake, self.real
        self.fake, self.real = copy.deepcopy(mine)
        self.merge(ranks)
        try:
            yield
        finally:
            self.fake, self.real = mine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes a batch and returns the score of it alone, on this rank."""
        self.update(*args, **kwargs)
        batch = self.clone()
        batch.reset()
        # Of the class: this instance's are wrapped, and would ask the other ranks.
        type(batch).update(batch, *args, **kwargs)
        return type(batch).compute(batch)

    def reset(self) -> None:
        super().reset()
        self.fake, self.real = copy.deepcopy(self._empty), copy.deepcopy(self._empty)
