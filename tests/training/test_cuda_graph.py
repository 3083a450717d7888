"""Steps that are replayed as a CUDA graph are the same steps, with every setting that changes what a step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import OptimizerConfig, RuntimeConfig
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.training.cuda_graph import CapturableAdam, CapturedStep
from pipeline.training.trainer import Trainer
from tests.jobs import restoring_process, tiny_config

SETTINGS: dict[str, dict[str, Any]] = {
    "wgan": {"critic_updates": "separate", "critic_fakes": "moving"},
    "wgan_gp": {
        "objective": "wgan_gp",
        "gradient_penalty": 10.0,
        "clip_value": None,
        "diff_augment": ["color", "translation", "cutout"],
    },
    "acgan": {"objective": "acgan", "clip_value": None},
    "burn-in": {"n_critic": 1, "burn_in_n_critic": 3, "burn_in_steps": 2, "burn_in_every": 4},
    "rpgan": {
        "objective": "rpgan",
        "r1_penalty": 1.0,
        "r2_penalty": 1.0,
        "penalty_annealing": 4,
        "clip_value": None,
        "critic_optimizer": OptimizerConfig(algorithm="adam", final_beta2=0.99, annealing_updates=4),
    },
    "crpgan": {"objective": "crpgan", "n_critic": 2, "clip_value": None},
    "spectral norm": {"spectral_norm": True, "clip_value": None},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_captured_step_walks_the_same_trajectory(name: str, tiny_dataset: Path, tmp_path: Path) -> None:
    walks: list[tuple[Tensor, dict[str, Tensor]]] = []
    with restoring_process():
        for captured in (False, True):
            config = tiny_config(
                data={"dataset": str(tiny_dataset)},
                run={"root": str(tmp_path)},
                training=SETTINGS[name],
                runtime={"device": "cuda", "cuda_graph": captured},
            )
            runtime = Runtime(config.runtime)
            trainer = Trainer(config, runtime)
            assert isinstance(trainer.step, CapturedStep) == captured
            for _ in range(5):
                trainer.take_step()
            walks.append((trainer.log.losses(), trainer.state.tensors()))
            runtime.close()
    (losses, tensors), (captured_losses, captured_tensors) = walks
    torch.testing.assert_close(captured_losses, losses, rtol=1e-4, atol=1e-6)
    for key, tensor in tensors.items():
        torch.testing.assert_close(captured_tensors[key], tensor, rtol=0, atol=1e-5)


def test_the_graphs_adam_is_torchs_and_reads_its_decay_rate_from_memory() -> None:
    """Including the correction of the bias, which takes the present rate."""
    weights = [[torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()] for _ in range(2)]
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}
    optimizers = torch.optim.Adam(weights[0], **settings), CapturableAdam(weights[1], **settings)
    rate, decay = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    optimizers[1].param_groups[0] |= {"lr": rate, "betas": (0.5, decay)}
    for step in range(4):
        optimizers[0].param_groups[0] |= {"lr": 0.1 / (1 + step), "betas": (0.5, 0.9 + 0.03 * step)}
        rate.fill_(0.1 / (1 + step))
        decay.fill_(0.9 + 0.03 * step)
        for [weight], optimizer in zip(weights, optimizers, strict=True):
            weight.grad = weight.detach().square() + step
            optimizer.step()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=0)
    states = [optimizer.state[weight] for [weight], optimizer in zip(weights, optimizers, strict=True)]
    torch.testing.assert_close(states[1], states[0])


def test_a_graph_needs_a_gpu() -> None:
    with restoring_process(), pytest.raises(UserError, match=r"runtime\.cuda_graph is true, which takes a CUDA device"):
        Runtime(RuntimeConfig(device="cpu", cuda_graph=True))
