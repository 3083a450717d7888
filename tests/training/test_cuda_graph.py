"""A step through inputs that stay in place, which is what a CUDA graph replays, is the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import RuntimeConfig, make_parser, parse
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.training.step import CapturedStep, Step
from pipeline.training.trainer import Trainer
from tests.jobs import TINY, process_kept

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ["wgan", "wgan_gp", "acgan"])
def test_a_captured_step_walks_the_same_trajectory(
    objective: str, device: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    chosen = {
        "wgan": ["--training.critic_updates", "separate", "--training.critic_fakes", "moving"],
        "wgan_gp": ["--training.gradient_penalty", "10", "--training.clip_value", "null"],
        "acgan": ["--training.clip_value", "null", "--training.critic_optimizer.decay", "0.1"],
    }[objective]
    place = ["--data.dataset", str(tiny_dataset), "--run.root", str(tmp_path), "--training.objective", objective]
    graph = ["--runtime.cuda_graph", "true"] if device == "cuda" else []
    found = []
    with process_kept():
        for captured in (False, True):
            arguments = [*TINY, *place, *chosen, "--runtime.device", device, *(graph if captured else [])]
            config, _ = parse(make_parser("test"), arguments)
            trainer = Trainer(config, Runtime(config.runtime))
            if captured and isinstance(trainer._step, Step):
                trainer._step = CapturedStep(trainer._step)
            batches = trainer.source.batches(0)
            for _ in range(5):
                trainer.train_step(batches)
                trainer.state.step += 1
            found.append((trainer.interval.losses(), trainer.state.tensors()))
    (losses, tensors), (captured_losses, captured_tensors) = found
    torch.testing.assert_close(captured_losses, losses, rtol=1e-4, atol=1e-6)
    for name, tensor in tensors.items():
        torch.testing.assert_close(captured_tensors[name], tensor, rtol=0, atol=0 if device == "cpu" else 1e-5)


def test_a_graph_needs_a_gpu() -> None:
    with process_kept(), pytest.raises(UserError, match=r"runtime\.cuda_graph is true, which takes a CUDA device"):
        Runtime(RuntimeConfig(device="cpu", cuda_graph=True))
