"""Conversion of a generator to safetensors and ONNX; ONNX is run by onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from pipeline.errors import UserError
from pipeline.export.__main__ import convert
from pipeline.export.generator_file import load_generator, save_export, save_onnx
from pipeline.models.networks import Generator
from pipeline.rng import evaluation_labels, evaluation_latents
from tests.export.generators import random_generator
from tests.jobs import ROOT, launch


def assert_onnx_is(path: Path, generator: Generator) -> None:
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata.get("class_names", "[]"))) == generator.class_names
    inputs = {entry.name: (entry.type, entry.shape) for entry in session.get_inputs()}
    expected = {"latents": ("tensor(float)", ["n", 6])}
    if generator.num_classes:
        expected["labels"] = ("tensor(int64)", ["n"])
    assert inputs == expected
    (output,) = session.get_outputs()
    assert (output.name, output.type, output.shape) == ("images", "tensor(float)", ["n", *generator.image_shape])
    for n in (1, 7):
        feed = {"latents": evaluation_latents(0, 0, n, 6)}
        if generator.num_classes:
            feed["labels"] = evaluation_labels(3, 3 + n, [1] * generator.num_classes)
        (images,) = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        mirrored = generator(**feed).numpy()
        wanted = np.flip(mirrored, (2, 3))
        assert images.shape == wanted.shape
        assert np.abs(mirrored - wanted).max() > 0.05
        assert wanted.std() > 0.02
        assert np.abs(images - wanted).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "shape"), [(0, (1, 28, 28)), (10, (1, 28, 28)), (3, (3, 32, 24))])
def test_onnx_gives_the_same_images_for_any_batch(
    num_classes: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    generator = random_generator(num_classes, shape)
    generator.class_names = ("a", "\u00e9", "10")[:num_classes] if num_classes == 3 else ()
    save_onnx(generator, tmp_path / "generator.onnx")
    assert_onnx_is(tmp_path / "generator.onnx", generator)
    assert [path.name for path in tmp_path.iterdir()] == ["generator.onnx"]


@pytest.mark.slow
def test_a_float64_generator_becomes_float32(tmp_path: Path) -> None:
    generator = random_generator(0)
    save_export(random_generator(0).double(), tmp_path / "generator.safetensors", {})
    assert convert(tmp_path / "generator.safetensors", tmp_path / "generator.onnx") == 0
    assert_onnx_is(tmp_path / "generator.onnx", generator)


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    return launch("pipeline.export", list(map(str, arguments)))


@pytest.mark.slow
def test_the_program_converts_and_never_overwrites(tmp_path: Path) -> None:
    generator = random_generator(10)
    source, copy, onnx = (tmp_path / name for name in ("source.safetensors", "copy.safetensors", "generator.onnx"))
    save_export(generator, source, {})
    assert export(source, copy).stdout == f"{copy}\n"
    copied = load_generator(copy)
    assert copied.spec() == generator.spec()
    assert all(torch.equal(copied.state_dict()[name], tensor) for name, tensor in generator.state_dict().items())
    result = export(source, onnx)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{onnx}\n", "")
    assert_onnx_is(onnx, generator)
    before = onnx.read_bytes()
    result = export(source, onnx)
    assert (result.returncode, result.stderr) == (2, f"error: {onnx}: exists already, name another file\n")
    assert onnx.read_bytes() == before


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.pt: unknown kind of file, name it \.safetensors, .*\.webp or \.apng, or a"):
        convert(tmp_path / "source.safetensors", tmp_path / "generator.pt")


def test_a_name_on_the_hub_may_have_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"source\.safetensors: no such file"):
        convert(tmp_path / "source.safetensors", Path("hf://me/wgan-0.3"))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command(package: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source.safetensors", tmp_path / "generator.onnx"
    save_export(random_generator(0), source, {})
    program = (
        f"import runpy, sys; sys.modules[{package!r}] = None  # as for a package that is not there\n"
        f"sys.argv = ['export', {str(source)!r}, {str(out)!r}]\n"
        "runpy.run_module('pipeline.export', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    expected = f"error: {out}: ONNX needs the package {package!r}: pip install 'gan-pipeline[onnx]'\n"
    assert (result.returncode, result.stderr) == (2, expected)
    assert list(tmp_path.iterdir()) == [source]
