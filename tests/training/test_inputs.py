"""What a step takes: the draws that rng.py documents, packed or not, and always in the same memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline import rng
from pipeline.config import Config, OptimizerConfig, TrainingConfig
from pipeline.data import Batch
from pipeline.distributed.collectives import Ranks
from pipeline.training.inputs import InputStream, StepInputs, beta2, ema_weight, learning_rate, penalty_factor
from pipeline.training.state import TrainingState, build_state
from tests.jobs import changed, tiny_config

SHAPE = (1, 8, 8)
RATES = OptimizerConfig(learning_rate=0.25, decay=0.5)


class Numbered:
    """Batch k holds nothing but k, and its labels too."""

    def __init__(self, size: int) -> None:
        self._size = size

    def batches(self, first: int) -> Iterator[Batch]:
        while True:
            yield Batch(
                torch.full((self._size, *SHAPE), first % 256, dtype=torch.uint8), torch.full((self._size,), first)
            )
            first += 1

    def damage(self) -> str | None:
        return None


def config_of(seed: int, precision: str = "float32") -> Config:
    return tiny_config(
        training={
            "objective": "wgan_gp",
            "gradient_penalty": 10.0,
            "clip_value": None,
            "diff_augment": ["cutout"],
            "seed": seed,
            "batch_size": 12,
            "n_critic": 3,
            "critic_optimizer": RATES,
            "generator_optimizer": RATES,
        },
        runtime={"precision": precision},
    )


def stream_of(config: Config, num_classes: int, ranks: Ranks, captured: bool) -> tuple[TrainingState, InputStream]:
    state = build_state(config, SHAPE, num_classes, torch.device("cpu"), torch.amp.GradScaler(enabled=False))
    source = Numbered(config.training.batch_size // ranks.world_size)
    return state, InputStream(config, state, source, ranks, captured)


def drawn_one_by_one(config: Config, step: int, num_classes: int, rows: slice) -> dict[str, Tensor]:
    seed, size, indices = config.training.seed, config.training.batch_size, range(config.training.n_critic)
    dim = config.network.latent_dim
    drawn = {
        "critic_latents": torch.stack([rng.latents(seed, step, i, size, dim, rows) for i in indices]),
        "mix": torch.stack([rng.penalty_mix(seed, step, i, size, rows) for i in indices]),
        "generator_latents": rng.latents(seed, step, None, size, dim, rows),
        "critic_augmentation": torch.stack([rng.augmentation(seed, step, i, size, rows) for i in indices]),
        "generator_augmentation": rng.augmentation(seed, step, None, size, rows),
        "critic_labels": torch.zeros(len(indices), rows.stop - rows.start, dtype=torch.int64),
        "generator_labels": torch.zeros(rows.stop - rows.start, dtype=torch.int64),
    }
    if num_classes:
        labels = [rng.labels(seed, step, i, size, num_classes, rows) for i in indices]
        drawn["critic_labels"] = torch.stack(labels)
        drawn["generator_labels"] = rng.labels(seed, step, None, size, num_classes, rows)
    return drawn


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize(("seed", "rank", "world_size"), [(0, 0, 1), (1, 0, 2), (2, 1, 2), (3, 3, 4)])
def test_inputs_are_this_ranks_rows_of_the_draws(
    seed: int, rank: int, world_size: int, num_classes: int, precision: str
) -> None:
    config, ranks = config_of(seed, precision), Ranks(rank, world_size)
    state, stream = stream_of(config, num_classes, ranks, captured=False)
    for step in (0, 1, 1000, 7):  # a resume may go anywhere
        state.step = step
        inputs = stream.take()
        for name, expected in drawn_one_by_one(config, step, num_classes, ranks.rows(12)).items():
            values = getattr(inputs, name)
            assert torch.equal(values, expected.to(values.dtype)), (name, step)
            assert values.dtype == (torch.int64 if "labels" in name else getattr(torch, precision))
        assert inputs.real[:, 0, 0, 0, 0].tolist() == [(3 * step + index) % 256 for index in range(3)]
        assert inputs.real_labels[:, -1].tolist() == (
            [3 * step, 3 * step + 1, 3 * step + 2] if num_classes else [0] * 3
        )
        assert inputs.critic_rates == [learning_rate(RATES, 3 * step + index) for index in range(3)]


@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_paired_step_takes_one_real_batch_more(num_classes: int) -> None:
    """After the critic's, with the augmentation of one more iteration; fake batches and rates are as many as ever."""
    config = changed(config_of(1), training={"objective": "rpgan", "gradient_penalty": None})
    state, stream = stream_of(config, num_classes, Ranks(1, 2), captured=False)
    for step in (0, 1, 7):
        state.step = step
        inputs = stream.take()
        assert inputs.real[:, 0, 0, 0, 0].tolist() == [4 * step + index for index in range(4)]
        assert inputs.real_labels[:, 0].tolist() == [4 * step + index if num_classes else 0 for index in range(4)]
        assert inputs.critic_augmentation is not None
        draws = [rng.augmentation(1, step, index, 12, slice(6, 12)) for index in range(4)]
        assert torch.equal(inputs.critic_augmentation, torch.stack(draws))
        assert len(inputs.critic_latents) == len(inputs.critic_labels) == 3
        assert inputs.critic_rates == [learning_rate(RATES, 3 * step + index) for index in range(3)]


@pytest.mark.parametrize("captured", [False, True])
def test_pairs_of_a_class_have_the_classes_of_the_real_images(captured: bool) -> None:
    config = changed(config_of(1), training={"objective": "crpgan", "gradient_penalty": None})
    state, stream = stream_of(config, 10, Ranks(1, 2), captured)
    for step in (0, 1, 7):
        state.step = step
        inputs = stream.take()
        assert inputs.real_labels[:, 0].tolist() == [4 * step + index for index in range(4)]
        assert torch.equal(inputs.critic_labels, inputs.real_labels[:3])
        assert torch.equal(inputs.generator_labels, inputs.real_labels[3])


@pytest.mark.parametrize("captured", [False, True])
def test_inputs_stay_where_they_are_in_memory(captured: bool) -> None:
    """Which is where a graph reads them; it reads rates there too."""
    config = config_of(0)
    state, stream = stream_of(config, 10, Ranks(), captured)

    def addresses(inputs: StepInputs) -> dict[str, int]:
        return {key: value.data_ptr() for key, value in inputs._asdict().items() if isinstance(value, Tensor)}

    first = addresses(stream.take())
    state.step = 5
    inputs = stream.take()
    assert addresses(inputs) == first
    assert len(set(first.values())) == len(first) == (13 if captured else 9)
    assert list(inputs.critic_rates) == pytest.approx([learning_rate(RATES, 15 + index) for index in range(3)])
    assert list(inputs.generator_rates) == pytest.approx([learning_rate(RATES, 5)])
    assert list(inputs.ema_weights) == pytest.approx([ema_weight(config.training, 5)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_latents_are_twice_a_uniform_number_less_one(seed: int) -> None:
    """How they were drawn first: runs of then go on."""
    uniform = torch.rand(12, 100, generator=rng.seeded(seed, "generator latents", 4))
    assert torch.equal(rng.latents(seed, 4, None, 12, 100, slice(3, 9)), uniform.mul(2).sub(1)[3:9])


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
    values = {update: learning_rate(config, update) for update in rates}
    assert values == pytest.approx({update: 3e-3 * factor for update, factor in rates.items()}, abs=1e-12)


def test_the_penalties_weights_fall_by_hand() -> None:
    """From 1 to 0.2 along half a cosine of 6 steps."""
    training = TrainingConfig(penalty_annealing=6, penalty_floor=0.2)
    factors = [penalty_factor(training, step) for step in (0, 2, 3, 4, 6, 100)]
    assert factors == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert penalty_factor(TrainingConfig(), 5) == 1.0


def test_adams_second_decay_rate_rises_by_hand() -> None:
    """From 0.9 to 0.98 along half a cosine of 6 updates; the learning rate stays."""
    config = OptimizerConfig(algorithm="adam", final_beta2=0.98, annealing_updates=6)
    values = [beta2(config, update) for update in (0, 2, 3, 4, 6, 100)]
    assert values == pytest.approx([0.9, 0.92, 0.94, 0.96, 0.98, 0.98])
    assert learning_rate(config, 5) == config.learning_rate
    training = {"critic_optimizer": config, "generator_optimizer": config}
    state, stream = stream_of(changed(config_of(0), training=training), 0, Ranks(), captured=False)
    state.step = 1
    inputs = stream.take()
    assert inputs.critic_beta2 == [beta2(config, update) for update in (3, 4, 5)]
    assert inputs.generator_beta2 == [beta2(config, 1)]


def test_the_averages_decay_per_step_by_hand() -> None:
    training = TrainingConfig(ema_decay=0.9)
    values = [ema_weight(training, step) for step in (0, 1, 79, 80, 81, 1000)]
    assert values == pytest.approx([0.9, 9 / 11, 9 / 89, 0.1, 0.1, 0.1])


def test_the_averages_half_life_in_images_by_hand() -> None:
    """With batches of 50 a half-life of 100 images is two steps long, so a step keeps sqrt(1/2). At step 20 of the
    warm-up the half-life is 0.05 of 1,000 images, one step; at step 0 nothing is kept."""
    training = TrainingConfig(batch_size=50, ema_decay=0.5, ema_half_life=100)
    kept = [1 - ema_weight(training, step) for step in (0, 10, 20, 40, 41, 1000)]
    assert kept == pytest.approx([0.0, 0.25, 0.5, math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5)])
