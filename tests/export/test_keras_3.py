"""Real Keras 3, on torch, reads the files of ours, and its files are read here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import OptimizerConfig, configure
from pipeline.errors import UserError
from pipeline.export.generator_file import load_generator
from pipeline.export.keras_files import save_keras
from pipeline.models.networks import AnyGenerator
from pipeline.models.objectives import choose, is_conditional
from pipeline.training.state import build_optimizer
from tests.export.generators import random_generator
from tests.jobs import ROOT, launch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("keras") is None, reason="takes keras")]
CONFIGS = ("wgan", "lsgan", "acgan")
MODELS = ("wgan", "acgan", "sequential", "nested")


def generator_of(name: str) -> AnyGenerator:
    """A generator with random weights as the shipped configuration has it, at a tenth of the width."""
    objective = choose(configure(ROOT / "configs" / f"{name}.yaml").training)
    return random_generator(10 if is_conditional(objective) else 0)


def images_of(generator: AnyGenerator, inputs: Any) -> Any:
    """What `keras_3.images_of` gives: (n, H, W, C), the right way round."""
    latents, *classes = (torch.from_numpy(array) for array in inputs.values())
    labels = classes[0].argmax(1) if classes else None
    return generator(latents, labels).flip(2, 3).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `keras_3.py` has been."""
    path, random = tmp_path_factory.mktemp("keras_3"), np.random.default_rng(1)
    for name in CONFIGS:
        generator = generator_of(name)
        save_keras(generator, path / f"{name}.h5")
        latents = random.uniform(-1, 1, (3, generator.config.latent_dim)).astype(np.float32)
        classes = [np.eye(10, dtype=np.float32)[[3, 1, 4]]] if generator.num_classes else []
        np.savez(path / f"{name}.npz", latents, *classes)
    variables = {"KERAS_BACKEND": "torch", "KERAS_HOME": str(path)}
    result = launch(ROOT / "tests/export/keras_3.py", [str(path)], variables=variables)
    assert result.returncode == 0, result.stderr
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_keras_3_makes_the_same_images_of_what_is_written(name: str, folder: Path) -> None:
    theirs, ours = np.load(folder / f"{name}.npy"), images_of(generator_of(name), np.load(folder / f"{name}.npz"))
    assert ours.std() > 0.01
    assert np.abs(theirs - ours).max() < 1e-6


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
@pytest.mark.parametrize("name", MODELS)
def test_what_keras_3_writes_is_read(name: str, suffix: str, folder: Path) -> None:
    path, inputs, expected = (folder / f"{name}.keras_3{end}" for end in (suffix, ".npz", ".npy"))
    if (name, suffix) == ("acgan", ".weights.h5"):
        with pytest.raises(UserError, match=r"\(weights alone tell neither .* with generator\.save\('FILE\.keras'\)\)"):
            load_generator(path)
        return
    generator, images = load_generator(path), np.load(expected)
    assert (generator.config.latent_dim, generator.num_classes) == (6, 10 if name == "acgan" else 0)
    assert images.std() > 0.005
    assert np.abs(images_of(generator, np.load(inputs)) - images).max() < 1e-6


def changed_copy(source: Path, target: Path, change: str) -> None:
    """A .keras file with something in it that cannot be read."""
    with ZipFile(source) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    if change == "no weights":
        del members["model.weights.h5"]
    if change in {"layer", "array"}:
        content = target.with_suffix(".h5")
        content.write_bytes(members["model.weights.h5"])
        with h5py.File(content, "a") as file:
            if change == "layer":
                file["layers/dense_1/vars/0"] = np.zeros(3)
            else:
                del file["layers/conv2d_transpose_2/vars/1"]
        members["model.weights.h5"] = content.read_bytes()
    with ZipFile(target, "w", ZIP_DEFLATED if change == "compressed" else 0) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


REFUSED = {
    "no weights": r"There is no item named 'model\.weights\.h5' in the archive",
    "layer": r"layer 'dense_1' holds 0 where the end should come",
    "array": r"layer 'conv2d_transpose_2' holds kernel where kernel, bias should come",
    "compressed": r"it is compressed; pack it again without compression",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_no_such_file_is_refused(change: str, folder: Path, tmp_path: Path) -> None:
    changed_copy(folder / "wgan.keras_3.keras", tmp_path / "out.keras", change)
    with pytest.raises(UserError, match=REFUSED[change]):
        load_generator(tmp_path / "out.keras")


def test_epsilon_stands_outside_rmsprops_root_here_and_inside_it_in_keras_3(folder: Path) -> None:
    """With rho 0.9 the first gradient g leaves v = 0.1 g^2. A step is lr g / (sqrt(v) + epsilon) here, as in Keras up
    to 2.3.1, and lr g / sqrt(v + epsilon) in Keras 3."""
    weight = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(weight.weight)
    optimizer, ours = build_optimizer(OptimizerConfig(learning_rate=0.01, rho=0.9, epsilon=1.0), weight), []
    first, second = 0.5, -0.25
    for gradient in (first, second):
        weight.weight.grad = torch.full((1, 1), gradient).double()
        optimizer.step()
        ours.append(weight.weight.item())
    v = 0.1 * first**2, 0.09 * first**2 + 0.1 * second**2
    outside = [-0.01 * gradient / (square**0.5 + 1) for gradient, square in zip((first, second), v, strict=True)]
    inside = [-0.01 * gradient / (square + 1) ** 0.5 for gradient, square in zip((first, second), v, strict=True)]
    assert ours == pytest.approx(np.cumsum(outside), rel=1e-6)
    assert np.load(folder / "rmsprop.npy") == pytest.approx(np.cumsum(inside), rel=1e-5)
