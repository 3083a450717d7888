"""The plain port must be the same training, or its speed says nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarking.plain import PlainCritic, PlainGenerator, PlainTrainer, plain_state, same_padding
from pipeline.config import Config, NetworkConfig, OptimizerConfig, TrainingConfig
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.models.networks import Critic, Generator, initialise
from pipeline.models.spectral_norm import raw_weights
from pipeline.rng import seeded
from pipeline.training.trainer import Trainer

FALLING = OptimizerConfig(decay=0.1)
TRAINING = {
    "wgan": TrainingConfig(),
    "wgan_gp": TrainingConfig(objective="wgan_gp", gradient_penalty=10.0, clip_value=None),
    "r1": TrainingConfig(objective="gan", r1_penalty=10.0, clip_value=None),
    "rpgan": TrainingConfig(
        objective="rpgan",
        r1_penalty=1.0,
        r2_penalty=2.0,
        penalty_annealing=3,
        clip_value=None,
        critic_optimizer=OptimizerConfig(algorithm="adam", final_beta2=0.99, annealing_updates=9),
    ),
    "crpgan": TrainingConfig(objective="crpgan", r1_penalty=1.0, r2_penalty=2.0, clip_value=None),
    "acgan": TrainingConfig(objective="acgan", clip_value=None, critic_optimizer=OptimizerConfig(algorithm="adam")),
    "acwgan": TrainingConfig(objective="acwgan"),
    "spectral_norm": TrainingConfig(spectral_norm=True, clip_value=None),
    "spectral_norm, clipped": TrainingConfig(spectral_norm=True, critic_updates="separate"),
    "burn_in": TrainingConfig(n_critic=1, burn_in_n_critic=3, burn_in_steps=1, burn_in_every=2),
    "separate": TrainingConfig(critic_updates="separate", critic_optimizer=FALLING, generator_optimizer=FALLING),
}


@pytest.mark.parametrize(("size", "before", "after"), [(28, 1, 2), (14, 1, 2), (7, 2, 2)])
def test_same_padding_with_stride_two_is_asymmetric(size: int, before: int, after: int) -> None:
    assert same_padding(size, stride=2) == (before, after)


@pytest.mark.parametrize("side", [28, 40, 64])
def test_the_plain_networks_are_the_same_at_any_depth(side: int) -> None:
    config, shape = NetworkConfig(latent_dim=5, width=0.05), (3, side, side)
    generator, critic = Generator(config, shape).double(), Critic(config, shape).double()
    plain_generator, plain_critic = PlainGenerator(config, shape, 0).double(), PlainCritic(config, shape).double()
    for network, plain in ((generator, plain_generator), (critic, plain_critic)):
        initialise(network, seeded(side, "weights"))
        plain.load_state_dict(plain_state(network))
    with torch.no_grad():
        images = generator(torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5))
        plain_images = plain_generator(torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5))
        torch.testing.assert_close(plain_images.flip(2, 3), images, rtol=0, atol=1e-12)
        torch.testing.assert_close(plain_critic(plain_images)[0], critic(images)[0], rtol=0, atol=1e-12)
    assert images.std() > 1e-3


def test_there_is_no_plain_port_of_a_network_of_the_users(config: Config, runtime: Runtime) -> None:
    own = NetworkConfig(generator="tests.odd_networks:Sound")
    with pytest.raises(UserError, match=r"the plain port is of the reference's networks, leave yours out"):
        PlainTrainer(Trainer(replace(config, network=own), runtime))


@pytest.mark.parametrize("fakes", ["batch", "moving"])
@pytest.mark.parametrize("training", TRAINING.values(), ids=TRAINING)
def test_the_plain_port_takes_the_same_steps(
    training: TrainingConfig, fakes: Literal["batch", "moving"], config: Config, runtime: Runtime
) -> None:
    trainer = Trainer(replace(config, training=replace(training, critic_fakes=fakes)), runtime)
    plain = PlainTrainer(trainer)
    for _ in range(4):
        trainer.log.begin()
        trainer.take_step()
        real_loss, fake_loss, generator_loss = trainer.log.losses()[0].tolist()
        ours = ((real_loss + fake_loss) / 2, generator_loss)
        with FlopCounterMode(display=False) as counter:  # as the benchmark counts it
            assert plain.take_step() == pytest.approx(ours, rel=1e-9)
        assert counter.get_total_flops() > 0
    for plain_network, network in ((plain.generator, trainer.state.generator), (plain.critic, trainer.state.critic)):
        assert isinstance(network, Generator | Critic)
        torch.testing.assert_close(raw_weights(plain_network.state_dict()), plain_state(network), rtol=0, atol=1e-9)


def test_an_augmented_step_is_compared_with_none(config: Config, runtime: Runtime) -> None:
    trainer = Trainer(replace(config, training=TrainingConfig(diff_augment=["color"])), runtime)
    with pytest.raises(UserError, match=r"training\.diff_augment is set: the plain step has no augmentation"):
        PlainTrainer(trainer)
