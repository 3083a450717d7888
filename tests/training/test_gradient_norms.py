"""Gradients that grow without bound, or are infinite while losses are not, are noticed at the next line of the log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.distributed.process import Runtime
from pipeline.errors import TrainingFailed
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer
from tests.jobs import restoring_process, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with restoring_process():
        yield Runtime(tiny_config().runtime)


def trainer_with(
    factors: dict[int, float], role: str, runtime: Runtime, dataset: Path, root: Path, steps: int
) -> Trainer:
    """A run whose critic's or generator's gradients come out of the backward pass times a factor, in steps that have
    one."""
    config = tiny_config(
        run={"root": str(root)},
        data={"dataset": str(dataset)},
        training={"objective": "lsgan", "clip_value": None, "n_critic": 1, "batch_size": 8, "steps": steps},
    )
    trainer = Trainer(config, runtime)

    def scaled(gradient: Tensor) -> Tensor:
        return gradient * factors.get(trainer.state.step + 1, 1)

    for weight in getattr(trainer.state, role).parameters():
        weight.register_hook(scaled)
    return trainer


def norms(trainer: Trainer, role: str) -> list[float]:
    lines = RunFolder(trainer.config.folder).metrics.read_text().splitlines()
    return [json.loads(line)[f"{role}_grad_norm"] for line in lines]


@pytest.mark.parametrize("role", ["critic", "generator"])
def test_growth_is_said_once_until_it_is_over(
    role: str, runtime: Runtime, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth line has three before it, which tell nothing; 100 times is no matter; from 7 on it is one growth, and
    12 is another. RMSprop takes the factors out of the updates, so the norms without them stay near one another."""
    factors = {4: 1e4, 6: 100.0, 8: 1e4, 9: 1e5, 10: 1e4, 12: 2e4}
    trainer = trainer_with(factors, role, runtime, tiny_dataset, tmp_path, steps=13)
    trainer.run()
    values = norms(trainer, role)
    for step, norm in enumerate(values, 1):
        assert norm / factors.get(step, 1) == pytest.approx(values[0], rel=0.8)
    warnings = re.findall(
        rf"step (\d+): the norm of the {role}'s gradients is (\S+), more than 1,000 times the median (\S+) "
        r"of the last (\d+) lines",
        capsys.readouterr().err,
    )
    assert [(int(step), int(lines)) for step, _, _, lines in warnings] == [(8, 7), (12, 11)]
    assert float(warnings[0][1]) == pytest.approx(values[7], rel=0.01)
    assert float(warnings[0][2]) == pytest.approx(sorted(values[:7])[3], rel=0.01)


@pytest.mark.parametrize(
    ("role", "factor", "norm"), [("critic", 1e30, "inf"), ("generator", float("inf"), r"(inf|nan)")]
)
def test_gradients_that_are_not_finite_end_the_run_at_the_next_line(
    role: str, factor: float, norm: str, runtime: Runtime, tiny_dataset: Path, tmp_path: Path
) -> None:
    """float32 holds no square of 1e30: RMSprop then divides by infinity, and the critic stands still. The generator's
    loss is that before its update."""
    trainer = trainer_with({3: factor}, role, runtime, tiny_dataset, tmp_path, steps=9)
    reason = rf"^step 3: the norm of the {role}'s gradients is {norm}, although the losses are finite; there is no chec"
    with pytest.raises(TrainingFailed, match=reason):
        trainer.run()
    assert trainer.log.losses().isfinite().all()


def test_a_loss_scale_may_overflow(runtime: Runtime, tiny_dataset: Path, tmp_path: Path) -> None:
    """fp16's scaler leaves out an update whose gradients are infinite, and halves its scale."""
    scaler, runtime.scaler = runtime.scaler, torch.amp.GradScaler("cpu")
    try:
        trainer = trainer_with({3: float("inf")}, "critic", runtime, tiny_dataset, tmp_path, steps=5)
        trainer.run()
    finally:
        runtime.scaler = scaler
    assert [norm == pytest.approx(norms(trainer, "critic")[0], rel=0.8) for norm in norms(trainer, "critic")] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert runtime.scaler is scaler
