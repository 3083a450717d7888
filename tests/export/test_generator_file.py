"""Generators in safetensors files, those written before the weights were mirrored among them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.export.__main__ import convert
from pipeline.export.generator_file import (
    critic_of,
    fingerprint,
    load_generator,
    read_generator,
    save_export,
)
from pipeline.models.networks import Critic, initialise
from pipeline.models.spectral_norm import use_spectral_norm
from pipeline.rng import seeded
from pipeline.storage.checkpoint import read_checkpoint
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import damage, random_generator, saved_run
from tests.jobs import ROOT, environment
from tests.trap import Trap

SHAPES = [(0, (1, 28, 28)), (3, (3, 32, 24))]


@pytest.mark.parametrize(("num_classes", "shape"), SHAPES)
def test_a_file_says_which_world_it_is_in_and_gives_the_same_generator(
    num_classes: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    generator, path = random_generator(num_classes, shape), tmp_path / "generator.safetensors"
    save_export(generator, path, {"run": "test", "step": 3})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "gan-pipeline generator 2"
    assert json.loads(header["provenance"]) == {"run": "test", "step": 3}
    loaded = load_generator(path)
    assert loaded.spec() == generator.spec()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == generator.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in generator.state_dict().items())


def test_an_export_of_another_format_is_refused(tmp_path: Path) -> None:
    generator, path = random_generator(), tmp_path / "generator.safetensors"
    save_file(generator.state_dict(), path, {"format": "gan-pipeline generator 1", "generator": "{}"})
    with pytest.raises(UserError, match="its header does not say 'gan-pipeline generator 2'"):
        load_generator(path)


@pytest.mark.parametrize("kind", ["missing", "text", "other tensors", "truncated", "wrong shape", "pickle"])
def test_a_file_that_is_not_an_export_is_refused_by_name(kind: str, export: Path, tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    if kind == "text":
        path.write_text("hello")
    elif kind == "other tensors":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "truncated":
        path.write_bytes(export.read_bytes()[:-10])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    elif kind == "wrong shape":
        generator = load_generator(export)
        generator.config = NetworkConfig(latent_dim=7, width=0.1)
        save_export(generator, path, {})
    with pytest.raises(UserError, match=f"{path}: (no such file|not a generator export)"):
        load_generator(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_reading_an_export_imports_neither_h5py_nor_torchvision(export: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.export.generator_file import load_generator\n"
        "import pipeline.export.images\n"
        f"load_generator(Path({str(export)!r}), 'ema')\n"
        "print(sorted({'h5py', 'torchvision', 'onnx', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_an_export_says_which_checkpoint_it_is_of_and_which_were_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = (
        saved_run(RunFolder(tmp_path / "run"), random_generator(), "ab" * 32, 10, 20),
        tmp_path / "out.safetensors",
    )
    damage(run.checkpoint(20))
    assert convert(run.path, out) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{out}\n"
    assert captured.err.startswith(f"skipped a damaged checkpoint: {run.checkpoint(20)}/")
    assert captured.err.count("\n") == 1
    facts = {"step": 10, "weights": "ema", "run": "run", "dataset": "ab" * 32}
    assert read_generator(out, "ema")[1] == facts | {"source": "run"}
    assert read_generator(run.checkpoint(10), "raw")[1] == facts | {"weights": "raw"}
    again = tmp_path / "again.safetensors"
    convert(out, again)
    assert read_generator(again, "ema")[1] == facts | {"source": "out.safetensors"}
    assert fingerprint(load_generator(again)) == fingerprint(random_generator())


def test_a_run_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    begun = saved_run(RunFolder(tmp_path / "begun"), random_generator(), "ab" * 32)
    with pytest.raises(UserError, match=r"begun: holds no checkpoint, one would be in .*begun/checkpoints"):
        load_generator(begun.path, "ema")
    with pytest.raises(UserError, match="holds no run, checkpoint or export: give a run's folder, such as runs/NAME"):
        load_generator(tmp_path, "ema")


@pytest.mark.parametrize("normalised", [False, True])
def test_a_checkpoints_critic_scores_as_the_one_that_was_saved(normalised: bool, tmp_path: Path) -> None:
    generator = random_generator(shape=(3, 64, 64))
    critic = Critic(generator.config, generator.image_shape)
    initialise(critic, seeded(3, "weights"))
    if normalised:
        use_spectral_norm(critic, seeded(3, "singular vectors"))
    run = saved_run(RunFolder(tmp_path / "run"), generator, "ab" * 32, 10, critic=critic)
    found = critic_of(read_checkpoint(run.checkpoint(10)))
    assert found is not None
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(found(images)[0], critic(images)[0])
