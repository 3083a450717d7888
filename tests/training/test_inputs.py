"""Rates, decays and counts of a step against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from pipeline.config import OptimizerConfig, TrainingConfig
from pipeline.training.inputs import ema_weight, learning_rate


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, {0: 1.0, 7: 1.0}),
        ({"decay": 0.5}, {0: 1.0, 1: 1 / 1.5, 2: 0.5, 6: 0.25}),
        ({"warm_up": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}),
        ({"annealing": "linear", "annealing_updates": 10}, {0: 1.0, 1: 0.9, 5: 0.5, 10: 0.0, 11: 0.0}),
        (
            {"annealing": "cosine", "annealing_updates": 6, "annealing_floor": 0.2},
            {0: 1.0, 1: 0.2 + 0.4 * (1 + math.sqrt(3) / 2), 2: 0.2 + 0.8 * 0.75, 3: 0.6, 4: 0.4, 6: 0.2, 100: 0.2},
        ),
        (
            {"decay": 1.0, "warm_up": 2, "annealing": "linear", "annealing_updates": 4, "annealing_floor": 0.5},
            {0: 0.5, 1: 0.5 * 0.875, 3: 0.25 * 0.625, 4: 0.2 * 0.5, 9: 0.1 * 0.5},
        ),
    ],
)
def test_learning_rates_by_hand(settings: dict[str, object], rates: dict[int, float]) -> None:
    config = OptimizerConfig(**({"learning_rate": 3e-3} | settings))  # type: ignore[arg-type]
    found = {update: learning_rate(config, update) for update in rates}
    assert found == pytest.approx({update: 3e-3 * factor for update, factor in rates.items()}, abs=1e-12)


def test_the_averages_decay_per_step_by_hand() -> None:
    training = TrainingConfig(ema_decay=0.9)
    found = [ema_weight(training, step) for step in (0, 1, 79, 80, 81, 1000)]
    assert found == pytest.approx([0.9, 9 / 11, 9 / 89, 0.1, 0.1, 0.1])


def test_the_averages_half_life_in_images_by_hand() -> None:
    """With batches of 50 a half-life of 100 images is two steps long, so a step keeps sqrt(1/2). At step 20 of the
    warm-up the half-life is 0.05 of 1,000 images, one step; at step 0 nothing is kept."""
    training = TrainingConfig(batch_size=50, ema_decay=0.5, ema_half_life=100)
    kept = [1 - ema_weight(training, step) for step in (0, 10, 20, 40, 41, 1000)]
    assert kept == pytest.approx([0.0, 0.25, 0.5, math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5)])
