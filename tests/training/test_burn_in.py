"""Steps with more critic iterations: which they are, what they take, what is told of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import rng
from pipeline.config import Config, OptimizerConfig, RuntimeConfig, TrainingConfig
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.process import Runtime
from pipeline.storage.run_folder import RunFolder
from pipeline.training.inputs import learning_rate
from pipeline.training.trainer import Trainer
from tests.jobs import changed, final_state, restoring_process, tiny_config
from tests.training.test_inputs import config_of, stream_of

BURN_IN = {"n_critic": 1, "burn_in_n_critic": 3, "burn_in_steps": 2, "burn_in_every": 4}
ITERATIONS = [3, 3, 1, 1, 3, 1, 1, 1, 3, 1]
"""Of the steps of BURN_IN."""


def official_iterations(step: int) -> int:
    """As main.py of WassersteinGAN has it."""
    return 100 if step < 25 or step % 500 == 0 else 5


@pytest.mark.parametrize(
    ("settings", "iterations"),
    [
        ({}, [5] * 1100),
        ({"burn_in_n_critic": 100}, [official_iterations(step) for step in range(1100)]),
        (BURN_IN, ITERATIONS),
        (BURN_IN | {"burn_in_steps": 0}, [3, 1, 1, 1, 3, 1, 1, 1, 3, 1]),
        (BURN_IN | {"burn_in_steps": 4}, [3, 3, 3, 3, 3, 1, 1, 1, 3, 1]),
        (BURN_IN | {"burn_in_steps": 6}, [3, 3, 3, 3, 3, 3, 1, 1, 3, 1]),
        (BURN_IN | {"burn_in_every": None}, [3, 3, 1, 1, 1, 1]),
        (BURN_IN | {"burn_in_every": 1}, [3] * 6),
    ],
)
def test_iterations_of_steps_by_hand(settings: dict[str, Any], iterations: list[int]) -> None:
    training, steps = TrainingConfig(**settings), range(len(iterations))
    assert [training.critic_iterations(step, step + 1) for step in steps] == iterations
    assert [training.critic_iterations(0, step) for step in steps] == [sum(iterations[:step]) for step in steps]
    assert training.critic_iterations(2, 5) == sum(iterations[2:5])


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("start", [0, 1, 2, 4, 5])
def test_a_step_takes_the_batches_after_those_of_the_steps_before(start: int, captured: bool) -> None:
    """Wherever a run goes on; with rates of the critic's update, and draws of the step and the iteration in it."""
    rates = OptimizerConfig(annealing="linear", annealing_updates=100)
    config = changed(config_of(1), training=BURN_IN | {"critic_optimizer": rates})
    state, stream = stream_of(config, 10, Ranks(1, 2), captured)
    for step in range(start, len(ITERATIONS)):
        state.step = step
        inputs, first = stream.take(), sum(ITERATIONS[:step])
        numbers = range(first, first + ITERATIONS[step])
        assert inputs.real[:, 0, 0, 0, 0].tolist() == inputs.real_labels[:, 0].tolist() == list(numbers)
        assert list(inputs.critic_rates) == pytest.approx([learning_rate(rates, number) for number in numbers])
        assert list(inputs.generator_rates) == pytest.approx([0.25 / (1 + 0.5 * step)])
        for index in range(ITERATIONS[step]):
            latents = rng.latents(1, step, index, 12, config.network.latent_dim, slice(6, 12))
            assert torch.equal(inputs.critic_latents[index], latents)
            assert inputs.mix is not None
            assert torch.equal(inputs.mix[index], rng.penalty_mix(1, step, index, 12, slice(6, 12)))


@pytest.fixture
def base(tiny_dataset: Path, tmp_path: Path) -> Config:
    training = {"steps": len(ITERATIONS), "batch_size": 8}
    return tiny_config(run={"root": str(tmp_path)}, data={"dataset": str(tiny_dataset)}, training=training)


def train(config: Config) -> dict[str, torch.Tensor]:
    with restoring_process():
        runtime = Runtime(RuntimeConfig(device="cpu", threads=1))
        Trainer(config, runtime).run()
        runtime.close()
    return final_state(config.folder, config.training.steps)


def test_a_burn_in_in_every_step_is_a_larger_n_critic(base: Config) -> None:
    always = train(changed(base, run={"name": "always"}, training=BURN_IN | {"burn_in_every": 1}))
    larger = train(changed(base, run={"name": "larger"}, training={"n_critic": 3}))
    sometimes = train(changed(base, run={"name": "sometimes"}, training=BURN_IN))
    assert all(torch.equal(tensor, larger[name]) for name, tensor in always.items())
    assert not torch.equal(sometimes["generator.dense.weight"], larger["generator.dense.weight"])


def test_images_a_second_count_the_iterations_that_were_taken(base: Config) -> None:
    config = changed(base, training=BURN_IN)
    train(config)
    lines = [json.loads(line) for line in RunFolder(config.folder).metrics.read_text().splitlines()]
    ends = [0.0, *(line["elapsed_seconds"] for line in lines)]
    seconds = [end - start for start, end in pairwise(ends)]
    images = [line["images_per_second"] * each for line, each in zip(lines, seconds, strict=True)]
    assert images == pytest.approx([8 * count for count in ITERATIONS], rel=1e-6)
