"""The plain port must be the same training, or its speed says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.baseline import PlainTrainer, same_padding
from pipeline.config import RuntimeConfig, make_parser, parse
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer
from tests.jobs import TINY, process_kept


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with process_kept():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


@pytest.mark.parametrize(("size", "before", "after"), [(28, 1, 2), (14, 1, 2), (7, 2, 2)])
def test_same_padding_with_stride_two_is_asymmetric(size: int, before: int, after: int) -> None:
    assert same_padding(size, stride=2) == (before, after)


@pytest.mark.parametrize("fakes", ["batch", "moving"])
@pytest.mark.parametrize("objective", ["wgan", "wgan_gp", "acgan"])
def test_the_plain_port_takes_the_same_steps(
    objective: str, fakes: str, runtime: Runtime, tiny_dataset: Path, tmp_path: Path
) -> None:
    chosen = {
        "wgan": [],
        "wgan_gp": ["--training.gradient_penalty", "10", "--training.clip_value", "null"],
        "acgan": ["--training.clip_value", "null", "--training.critic_optimizer.algorithm", "adam"],
    }[objective]
    place = ["--data.dataset", str(tiny_dataset), "--run.root", str(tmp_path), "--runtime.precision", "float64"]
    variant = ["--training.objective", objective, "--training.critic_fakes", fakes, *chosen]
    config, _ = parse(make_parser("test"), [*TINY, *place, *variant])
    trainer = Trainer(config, runtime)
    plain = PlainTrainer(trainer)
    batches, plain_batches = trainer.source.batches(0), trainer.source.batches(0)
    for _ in range(4):
        trainer.interval.begin()
        trainer.train_step(batches)
        trainer.state.step += 1
        real_loss, fake_loss, generator_loss = trainer.interval.losses()[0].tolist()
        ours = ((real_loss + fake_loss) / 2, generator_loss)
        assert plain.train_step(plain_batches) == pytest.approx(ours, rel=1e-9)
    weights = plain.generator.state_dict()["dense.weight"]
    torch.testing.assert_close(weights, trainer.state.generator.dense.weight.detach(), rtol=0, atol=1e-9)
