"""Exports and pictures, through the program a user runs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.export import load_export, save_export
from pipeline.models.networks import Generator, initialise
from pipeline.pictures import interpolate, render_range, sample_grid, to_uint8
from pipeline.rng import seeded
from tests.jobs import ROOT
from tests.trap import Trap


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = Generator(NetworkConfig(latent_dim=6, width=0.1), (1, 28, 28))
    initialise(generator, seeded(0, "weights"))
    path = tmp_path_factory.mktemp("export") / "generator.safetensors"
    save_export(generator, path, {"run": "test", "step": 3})
    return path


@pytest.fixture(scope="module")
def classed_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = Generator(NetworkConfig(latent_dim=6, width=0.1), (1, 28, 28), num_classes=12)
    initialise(generator, seeded(1, "weights"))
    for name, tensor in generator.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(0.05)  # contrast, so that images differ
    path = tmp_path_factory.mktemp("export") / "generator.safetensors"
    save_export(generator, path, {})
    return path


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipeline/generate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_pixels_become_bytes_from_a_fixed_range() -> None:
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0, 0.2509, 0.2489])).tolist() == [0, 128, 255, 64, 63]


def test_an_image_depends_on_the_seed_and_its_number_alone(export: Path) -> None:
    generator = load_export(export)
    whole = render_range(generator, 5, 0, 300)
    torch.testing.assert_close(render_range(generator, 5, 250, 300).int(), whole[250:].int(), rtol=0, atol=1)
    assert not torch.equal(render_range(generator, 6, 0, 300), whole)


def test_a_grid_single_images_and_a_strip(export: Path, tmp_path: Path) -> None:
    assert generate("-g", export, "--out", tmp_path / "grid.png").returncode == 0
    assert generate("-g", export, "--interpolate", "--out", tmp_path / "strip.png").returncode == 0
    assert generate("-g", export, "--count", 20, "--out", tmp_path / "images").returncode == 0
    side = 2 * (28 + 2)
    assert pixels(tmp_path / "grid.png").shape[:2] == (4 * side + 4, 4 * side + 4)
    assert pixels(tmp_path / "strip.png").shape[:2] == (8 * side + 4, 10 * side + 4)
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(20)]
    expected = render_range(load_export(export), 0, 0, 20)[:, 0].numpy()
    assert np.abs(np.stack([pixels(file) for file in files]).astype(int) - expected).max() <= 1
    again = generate("-g", export, "--out", tmp_path / "grid.png")
    assert (again.returncode, again.stderr) == (
        2,
        f"error: {tmp_path / 'grid.png'}: exists already, choose another --out\n",
    )


def test_an_image_of_a_class_depends_on_the_seed_and_its_number_alone(classed_export: Path) -> None:
    generator = load_export(classed_export)
    sevens = render_range(generator, 5, 0, 40, label=7)
    torch.testing.assert_close(render_range(generator, 5, 30, 40, label=7).int(), sevens[30:].int(), rtol=0, atol=1)
    mixed = render_range(generator, 5, 0, 40)
    same = [bool((sevens[i].int() - mixed[i].int()).abs().max() <= 1) for i in range(40)]
    assert same == [i % 12 == 7 for i in range(40)]
    strip = interpolate(generator, 5, 2, 3, label=7)
    torch.testing.assert_close(strip[[0, 3]].int(), sevens[:2].int(), rtol=0, atol=1)


def test_a_grid_has_a_row_a_class_up_to_ten(export: Path, classed_export: Path) -> None:
    generator = load_export(classed_export)
    images, columns = sample_grid(generator, 5)
    assert (len(images), columns) == (100, 10)
    torch.testing.assert_close(images[70:80].int(), render_range(generator, 5, 0, 10, label=7).int(), rtol=0, atol=1)
    images, columns = sample_grid(load_export(export), 5)
    assert columns == 4
    assert torch.equal(images, render_range(load_export(export), 5, 0, 16))


def test_the_program_draws_one_class(classed_export: Path, tmp_path: Path) -> None:
    assert generate("-g", classed_export, "--out", tmp_path / "grid.png").returncode == 0
    assert generate("-g", classed_export, "--class", 7, "--out", tmp_path / "sevens.png").returncode == 0
    assert generate("-g", classed_export, "--class", 7, "--count", 12, "--out", tmp_path / "sevens").returncode == 0
    side = 2 * (28 + 2)
    assert pixels(tmp_path / "grid.png").shape[:2] == (10 * side + 4, 10 * side + 4)
    assert pixels(tmp_path / "sevens.png").shape[:2] == (4 * side + 4, 4 * side + 4)
    files = sorted((tmp_path / "sevens").iterdir())
    expected = render_range(load_export(classed_export), 0, 0, 12, label=7)[:, 0].numpy()
    assert np.abs(np.stack([pixels(file) for file in files]).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("label", "reason"), [(12, "has the classes 0 to 11"), (-1, "has the classes 0 to 11"), (0, "")]
)
def test_a_class_that_is_not_there_is_refused(
    label: int, reason: str, export: Path, classed_export: Path, tmp_path: Path
) -> None:
    path = classed_export if reason else export
    result = generate("-g", path, f"--class={label}", "--out", tmp_path / "out.png")
    expected = f"error: --class is {label}: {path} {reason or 'has no classes, leave it away'}\n"
    assert (result.returncode, result.stderr) == (2, expected)
    assert not list(tmp_path.iterdir())


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
        generator = load_export(export)
        generator.config = NetworkConfig(latent_dim=7, width=0.1)
        save_export(generator, path, {})
    with pytest.raises(UserError, match=f"{path}: (no such file|not a generator export)"):
        load_export(path)
    assert not (tmp_path / "executed").exists()


def test_the_program_tells_a_bad_file_in_one_line(tmp_path: Path) -> None:
    result = generate("-g", tmp_path / "nothing.safetensors", "--out", tmp_path / "out.png")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'nothing.safetensors'}: no such file")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
