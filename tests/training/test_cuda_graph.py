"""Steps that are replayed as a CUDA graph are the same steps, with every setting that changes what a step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import RuntimeConfig
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.training.cuda_graph import CapturedStep
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


def test_a_graph_needs_a_gpu() -> None:
    with restoring_process(), pytest.raises(UserError, match=r"runtime\.cuda_graph is true, which takes a CUDA device"):
        Runtime(RuntimeConfig(device="cpu", cuda_graph=True))
