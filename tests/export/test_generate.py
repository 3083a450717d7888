"""Pictures, through the program a user runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.export.generator_file import load_generator, save_export
from pipeline.export.images import render_range
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import damage, random_generator, saved_run
from tests.jobs import ROOT, launch


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return launch(ROOT / "pipeline/generate.py", list(map(str, arguments)))


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_grid_single_images_and_a_strip(export: Path, tmp_path: Path) -> None:
    assert generate("-g", export, "--out", tmp_path / "grid.png").returncode == 0
    assert generate("-g", export, "--interpolate", "--out", tmp_path / "strip.png").returncode == 0
    assert generate("-g", export, "--count", 20, "--out", tmp_path / "images").returncode == 0
    side = 2 * (28 + 2)
    assert pixels(tmp_path / "grid.png").shape[:2] == (4 * side + 4, 4 * side + 4)
    assert pixels(tmp_path / "strip.png").shape[:2] == (8 * side + 4, 10 * side + 4)
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(20)]
    expected = render_range(load_generator(export), 0, 0, 20)[:, 0].numpy()
    assert np.abs(np.stack([pixels(file) for file in files]).astype(int) - expected).max() <= 1
    again = generate("-g", export, "--out", tmp_path / "grid.png")
    assert (again.returncode, again.stderr) == (
        2,
        f"error: {tmp_path / 'grid.png'}: exists already, choose another --out\n",
    )


def test_the_program_draws_one_class(classed_export: Path, tmp_path: Path) -> None:
    assert generate("-g", classed_export, "--out", tmp_path / "grid.png").returncode == 0
    assert generate("-g", classed_export, "--class", 7, "--out", tmp_path / "sevens.png").returncode == 0
    assert generate("-g", classed_export, "--class", 7, "--count", 12, "--out", tmp_path / "sevens").returncode == 0
    side = 2 * (28 + 2)
    assert pixels(tmp_path / "grid.png").shape[:2] == (10 * side + 4, 10 * side + 4)
    assert pixels(tmp_path / "sevens.png").shape[:2] == (4 * side + 4, 4 * side + 4)
    files = sorted((tmp_path / "sevens").iterdir())
    expected = render_range(load_generator(classed_export), 0, 0, 12, label=7)[:, 0].numpy()
    assert np.abs(np.stack([pixels(file) for file in files]).astype(int) - expected).max() <= 1


def test_a_class_is_drawn_by_its_name(tmp_path: Path) -> None:
    """Of a dataset of before, whose classes are in the order of their text, 2 is the class named so: the fourth."""
    generator, path = random_generator(12), tmp_path / "generator.safetensors"
    generator.class_names = tuple(sorted(map(str, range(12))))
    save_export(generator, path, {})
    result = generate("-g", path, "--out", tmp_path / "grid.png")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'grid.png'}\n")
    assert result.stderr == "rows, from the top: '0', '1', '10', '11', '2', '3', '4', '5', '6', '7'\n"
    assert generate("-g", path, "--class", 2, "--count", 3, "--out", tmp_path / "twos").returncode == 0
    found = np.stack([pixels(file) for file in sorted((tmp_path / "twos").iterdir())]).astype(int)
    expected, others = (render_range(load_generator(path), 0, 0, 3, label=label)[:, 0].numpy() for label in (4, 2))
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - others).max() > 2
    result = generate("-g", path, "--class", "twelve", "--out", tmp_path / "twelve.png")
    names = "'0', '1', '10', '11', '2', '3', '4', '5', '6', '7', '8', '9'"
    expected_line = f"error: --class is twelve: {path} has no such class, it has {names}\n"
    assert (result.returncode, result.stderr) == (2, expected_line)
    assert not (tmp_path / "twelve.png").exists()
    hidden = generate("-g", path, "--class", "twelve", "--out", tmp_path / "grid.png")
    assert hidden.stderr == expected_line, "not that the picture exists"


NAMELESS = "has the classes 0 to 11 and does not hold their names"
"""An export as it was written before it held names."""
NO_CLASSES = (
    "has no classes, leave it away (classes are learnt with --config quickstart, or --training.objective crpgan, acgan"
)


@pytest.mark.parametrize(("label", "reason"), [(12, NAMELESS), (-1, NAMELESS), ("cat", NAMELESS), (0, "")])
def test_a_class_that_is_not_there_is_refused(
    label: int | str, reason: str, export: Path, classed_export: Path, tmp_path: Path
) -> None:
    path = classed_export if reason else export
    result = generate("-g", path, f"--class={label}", "--out", tmp_path / "out.png")
    expected = f"error: --class is {label}: {path} {reason or NO_CLASSES + ' or acwgan)'}\n"
    assert (result.returncode, result.stderr) == (2, expected)
    assert not list(tmp_path.iterdir())


def test_what_was_meant_is_offered(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    for arguments, message in (
        (
            ("-g", tmp_path / "quickstrat"),
            f"no such file or folder (did you mean {tmp_path}/quickstart?); give a run's",
        ),
        ((), "the following arguments are required: -g GENERATOR; look at --help\n"),
        (("runs/quickstart",), "runs/quickstart is not understood: did you mean -g runs/quickstart?\n"),
        (("-g", "runs/quickstart", "--cla", "7"), "--cla 7 is not understood: did you mean --class?\n"),
    ):
        result = generate(*arguments, "--out", tmp_path / "out.png")
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_picture_is_named_for_what_it_holds(export: Path, tmp_path: Path) -> None:
    result = generate("-g", export, "--out", tmp_path / "grid.jpg")
    expected = f"error: --out is {tmp_path / 'grid.jpg'}: a picture is written as PNG, name it .png\n"
    assert (result.returncode, result.stderr) == (2, expected)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_line(export: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options in ((), ("--count", "3")):
        result = generate("-g", export, *options, "--out", tmp_path / "file" / "out.png")
        assert result.returncode == 3
        assert result.stderr.startswith(f"error: {tmp_path / 'file'}")
        assert len(result.stderr.splitlines()) == 1


def test_a_name_that_a_terminal_would_obey_is_written_out(tmp_path: Path) -> None:
    result = generate("-g", tmp_path / "\x1b[2Jgone.safetensors", "--out", tmp_path / "out.png")
    assert result.stderr.startswith(f"error: {tmp_path}/\\x1b[2Jgone.safetensors: no such file")


def test_the_program_tells_a_bad_file_in_one_line(tmp_path: Path) -> None:
    for name, words in (("nothing.safetensors", "no such file"), ("g.onnx", "ONNX is written, not read: give the run")):
        result = generate("-g", tmp_path / name, "--out", tmp_path / "out.png")
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {tmp_path / name}: {words}")
        assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_program_names_a_damaged_checkpoint_that_it_passes_over(tmp_path: Path) -> None:
    run = saved_run(RunFolder(tmp_path / "run"), random_generator(), "ab" * 32, 10, 20)
    damage(run.checkpoint(20))
    result = generate("-g", run.path, "--out", tmp_path / "grid.png")
    assert result.returncode == 0
    assert result.stderr.startswith(f"skipped a damaged checkpoint: {run.checkpoint(20)}/")
    assert len(result.stderr.splitlines()) == 1
