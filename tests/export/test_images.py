"""Images of generators, and how they are laid out in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.export.__main__ import convert
from pipeline.export.generator_file import load_generator
from pipeline.export.images import interpolate, render, render_range, sample_grid, save_each, save_grid
from pipeline.models.networks import AnyGenerator
from pipeline.rng import evaluation_latents
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import random_generator


def test_pixels_become_bytes_from_a_fixed_range() -> None:
    class Fixed(AnyGenerator):
        def __init__(self) -> None:
            super().__init__(NetworkConfig(), (1, 1, 5), 0)
            self.pixels = torch.nn.Parameter(torch.tensor([[[[0.0, 0.5, 1.0, 0.2509, 0.2489]]]]))

        def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            return self.pixels

    assert render(Fixed(), torch.zeros(1, 1)).flatten().tolist() == [63, 64, 255, 128, 0]


def test_an_image_depends_on_the_seed_and_its_number_alone(export: Path) -> None:
    generator = load_generator(export)
    whole = render_range(generator, 5, 0, 300)
    torch.testing.assert_close(render_range(generator, 5, 250, 300).int(), whole[250:].int(), rtol=0, atol=1)
    assert not torch.equal(render_range(generator, 6, 0, 300), whole)


def test_an_image_of_a_class_depends_on_the_seed_and_its_number_alone(classed_export: Path) -> None:
    generator = load_generator(classed_export)
    sevens = render_range(generator, 5, 0, 40, label=7)
    torch.testing.assert_close(render_range(generator, 5, 30, 40, label=7).int(), sevens[30:].int(), rtol=0, atol=1)
    mixed = render_range(generator, 5, 0, 40)
    same = [bool((sevens[i].int() - mixed[i].int()).abs().max() <= 1) for i in range(40)]
    assert same == [i % 12 == 7 for i in range(40)]
    for label in (12, -1):
        with pytest.raises(UserError, match=f"label is {label}: the classes are 0 to 11"):
            render_range(generator, 5, 0, 1, label=label)
    with pytest.raises(UserError, match="label is 0: there are no classes"):
        render_range(random_generator(), 5, 0, 1, label=0)
    strip = interpolate(generator, 5, 2, 3, label=7)
    torch.testing.assert_close(strip[[0, 3]].int(), sevens[:2].int(), rtol=0, atol=1)


def test_single_images_that_are_interrupted_leave_nothing(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.images.BATCH", 2)
    generator, renders = load_generator(export), iter([render_range])

    def interrupted(*arguments: Any) -> torch.Tensor:
        for render_once in renders:
            return render_once(*arguments)
        assert len(list(tmp_path.rglob("*.png"))) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.export.images.render_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_each(generator, 0, 3, tmp_path / "images")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save_each(generator, 0, 3, tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "images").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_grid_has_a_row_a_class_up_to_ten(export: Path, classed_export: Path) -> None:
    generator = load_generator(classed_export)
    images, columns = sample_grid(generator, 5)
    assert (len(images), columns) == (100, 10)
    torch.testing.assert_close(images[70:80].int(), render_range(generator, 5, 0, 10, label=7).int(), rtol=0, atol=1)
    images, columns = sample_grid(load_generator(export), 5)
    assert columns == 4
    assert torch.equal(images, render_range(load_generator(export), 5, 0, 16))


def test_images_are_flipped_back_once() -> None:
    generator = random_generator(shape=(3, 32, 24))
    latents = evaluation_latents(0, 0, 5, 6)
    mirrored = (generator(latents) * 255).round().to(torch.uint8)
    images = render(generator, latents)
    assert torch.equal(images, mirrored.flip(2, 3))
    assert not torch.equal(images, mirrored)


@pytest.mark.parametrize("columns", [1, 4, 5, 20])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 7, 5)])
def test_a_picture_has_the_pixels_of_torchvisions_grid(
    columns: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """The last row is full, has gaps, or is the only one."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, *shape), dtype=torch.uint8, generator=random)
    save_grid(images, tmp_path / "folder/grid.png", columns, scale=3)
    expected = make_grid(images, nrow=columns, padding=2, pad_value=128).permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "folder/grid.png") as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), expected.repeat(3, 0).repeat(3, 1))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["grid.png"]


@pytest.mark.parametrize("suffix", [".webp", ".apng"])
def test_an_animation_has_the_pixels_of_the_samples_in_their_order(suffix: str, tmp_path: Path) -> None:
    run, random = RunFolder(tmp_path / "run"), torch.Generator().manual_seed(0)
    for step in (500, 5, 10_000):
        images = torch.randint(0, 256, (6, 1, 5, 5), dtype=torch.uint8, generator=random)
        save_grid(images, run.grid(step), 3)
    save_grid(images, run.interpolation(500), 3)
    assert convert(run.path, tmp_path / f"samples{suffix}") == 0
    with Image.open(tmp_path / f"samples{suffix}") as animation:
        assert (animation.n_frames, animation.info["loop"]) == (3, 0)  # type: ignore[attr-defined]
        for index, (_, grid) in enumerate(run.grids()):
            animation.seek(index)
            animation.load()
            assert animation.info["duration"] == (2000 if index == 2 else 200)
            with Image.open(grid) as expected:
                assert np.array_equal(np.asarray(animation.convert("RGB")), np.asarray(expected))
    with pytest.raises(UserError, match=f"{tmp_path}: holds no samples, of which an animation is made: give a run"):
        convert(tmp_path, tmp_path / f"none{suffix}")
    assert not (tmp_path / f"none{suffix}").exists()


def test_an_export_may_be_a_picture(export: Path, tmp_path: Path) -> None:
    generator = load_generator(export)
    assert convert(export, tmp_path / "grid.png") == 0
    assert convert(export, tmp_path / "strip.png", picture="interpolation") == 0
    save_grid(sample_grid(generator, 0)[0], tmp_path / "expected_grid.png", 4)
    save_grid(interpolate(generator, 0, 8, 10), tmp_path / "expected_strip.png", 10)
    for name in ("grid.png", "strip.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / f"expected_{name}").read_bytes()
