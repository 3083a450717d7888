"""Contract 4: only a step changes what is trained. Evaluations, samples, checkpoints, logs, trackers, the profiler, the
export, the report and the doctor leave every number and its memory as they were."""

from __future__ import annotations

import pickle
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.prepare import prepare_npz
from pipeline.distributed.process import Runtime
from pipeline.errors import TrainingFailed
from pipeline.training.trainer import Trainer
from tests.jobs import ROOT, changed, launch, restoring_process, tiny_config
from tests.training.watched import snapshot

OWN = {"generator": "tests.guide:Generator", "critic": "tests.guide:Critic", "options": {"hidden": 12}}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "ema": {"evaluation": {"weights": "ema"}},
    "raw": {"evaluation": {"weights": "raw"}, "training": {"spectral_norm": True}},
    "of-ones-own": {"evaluation": {"weights": "raw"}, "network": OWN},
}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_but_a_step_changes_what_is_trained(world_size: int, tmp_path: Path) -> None:
    """With everything on, and held-out images, on which a critic is scored too. The states are compared on each rank,
    between one step and the next and at the end."""
    noise, files = np.random.default_rng(0), {split: tmp_path / f"{split}.npz" for split in ("train", "test")}
    for file in files.values():
        np.savez(file, images=noise.integers(0, 256, (120, 8, 8), dtype=np.uint8))
    config = tiny_config(
        run={
            **{"root": str(tmp_path), "trackers": ["tensorboard"], "log_every": 1, "sample_every": 2},
            **{"checkpoint_every": 1, "keep_best": "fid", "profile": "3:3"},
        },
        data={"dataset": str(prepare_npz(tmp_path, "noise", files).folder)},
        training={"steps": 4, "batch_size": 8, "n_critic": 2},
        evaluation={"every": 2, "num_images": 200, "features": ["torch.nn:Flatten"]},
    )
    configs = [changed(changed(config, **settings), run={"name": name}) for name, settings in RUNS.items()]
    runs = b64encode(pickle.dumps(configs)).decode()
    result = launch(ROOT / "tests/training/watched.py", [runs], world_size)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_checkpoint_after_one_that_failed_is_saved(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"objective": "lsgan", "clip_value": None}
    config = tiny_config(run={"root": str(tmp_path)}, data={"dataset": str(tiny_dataset)}, training=objective)
    with restoring_process():
        trainer = Trainer(config, Runtime(config.runtime))
        saver, folder, state = trainer.saver, trainer.folder, trainer.state
        folder.path.mkdir()
        folder.config.touch()
        folder.checkpoints.touch()  # a file where the folder should be
        state.step = 1
        saver.save()
        deadline = time.monotonic() + 60
        while saver.writer.failures_in_a_row == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        folder.checkpoints.unlink()
        state.step = 2
        saver.save()
        saver.writer.finish()
        saver.report()
        trainer.runtime.close()
    assert folder.saved_steps() == [2]
    lines = capsys.readouterr().err
    assert "checkpoint failed (1 in a row" in lines
    assert lines.endswith("step 2: saved\n")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_critic_beyond_its_clip_is_not_saved(tiny_dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)}, data={"dataset": str(tiny_dataset)})
    with restoring_process():
        trainer = Trainer(config, Runtime(config.runtime))  # before the first step nothing is clipped
        trainer.folder.path.mkdir()
        trainer.folder.config.touch()
        trainer.state.step = 1
        trainer.saver.save()
        trainer.state.step = 2  # when the outcome is known
        reason = r"critic\.convolutions\.0\.weight reaches .*, beyond the clip value 0\.01"
        with pytest.raises(TrainingFailed, match=rf"^step 1: must not be saved, rank 0: {reason}"):
            trainer.saver.save_now()
        trainer.runtime.close()
    assert trainer.folder.saved_steps() == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_copy_is_equal_and_writes_nowhere_else(tiny_dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(
        run={"root": str(tmp_path)},
        data={"dataset": str(tiny_dataset)},
        training={"spectral_norm": True, "batch_size": 8},
        runtime={"precision": "bf16"},
    )
    with restoring_process():
        runtime = Runtime(config.runtime)
        trainer = Trainer(config, runtime)
        trainer.take_step()
        state, before = trainer.state, snapshot(trainer.state)
        copies = {
            "ema": state.copied_generator("ema"),
            "generator": state.copied_generator("raw"),
            "critic": state.copied_critic(),
        }
        for role, copied in copies.items():
            live = getattr(state, role).state_dict()
            assert live.keys() == copied.state_dict().keys()
            assert all(torch.equal(live[name], tensor) for name, tensor in copied.state_dict().items()), role
            assert not any(module.training for module in copied.modules())
            assert not any(parameter.requires_grad for parameter in copied.parameters())
            copied.train().requires_grad_()
            for tensor in copied.state_dict().values():
                tensor.zero_()
            copied.to(torch.float64)
        assert before == snapshot(state)
        runtime.close()
