"""The names of a dataset's classes, from the dataset to everything that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import train
from pipeline.data.prepare import prepare_folder
from pipeline.errors import UserError
from pipeline.export.__main__ import convert
from pipeline.export.generator_file import fingerprint, load_generator, save_export
from pipeline.storage.checkpoint import find
from pipeline.storage.run_folder import RunFolder
from tests.data.test_prepare import save
from tests.export.generators import random_generator, saved_run
from tests.jobs import tiny_config

NAMES = ["2", "10", "caf\u00e9", "tea"]


def test_a_run_hands_the_names_on(tmp_path: Path) -> None:
    for name in NAMES:
        for copy in range(4):
            save(tmp_path / "in" / name / f"{copy}.png", np.full((8, 8), 10 * copy))
    dataset = prepare_folder(tmp_path, "drinks", {"train": tmp_path / "in"})
    common = {"steps": 1, "batch_size": 8, "clip_value": None}
    config = tiny_config(
        data={"dataset": str(dataset.folder)},
        training=common | {"objective": "acgan"},
        run={"root": str(tmp_path), "name": "drinks_run", "trackers": [], "sample_every": 1},
    )
    folder = RunFolder(train(config).folder.path)
    with safe_open(folder.export, "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == NAMES
    assert find(folder).progress["class_names"] == NAMES
    for weights in ("ema", "raw"):
        assert load_generator(folder.path, weights).class_names == tuple(NAMES)
    assert "rows of the samples, from the top: `2`, `10`, `caf\u00e9`, `tea`\n" in folder.report("md").read_text()
    assert "<p>Generated rows, from the top: 2, 10, caf\u00e9, tea.</p>" in folder.report("html").read_text()

    hub, copied = tmp_path / "hub", tmp_path / "copy.safetensors"
    assert convert(folder.path, hub) == convert(hub, copied) == 0
    assert load_generator(copied).class_names == tuple(NAMES)
    assert json.loads((hub / "config.json").read_text())["class_names"] == NAMES
    assert "Rows, from the top: `2`, `10`, `caf\u00e9`, `tea`.\n" in (hub / "README.md").read_text()


def test_files_of_before_have_no_names_and_a_name_changes_no_fingerprint(tmp_path: Path) -> None:
    generator = random_generator(3, (3, 32, 24))
    before = fingerprint(generator)
    path, run = tmp_path / "generator.safetensors", RunFolder(tmp_path / "run")
    header = {"format": "gan-pipeline generator 2", "generator": json.dumps(generator.spec()), "provenance": "{}"}
    save_file({name: tensor.contiguous() for name, tensor in generator.state_dict().items()}, path, header)
    saved_run(run, generator, "ab" * 32, 10)  # its progress is what checkpoints of before had
    for source in (path, run.path):
        assert load_generator(source).class_names == ()
        assert fingerprint(load_generator(source)) == before
    generator.class_names = ("a", "b", "c")
    save_export(generator, path, {})
    assert load_generator(path).class_names == ("a", "b", "c")
    assert fingerprint(load_generator(path)) == before


@pytest.mark.parametrize("names", ["{", '"abc"', "[1, 2, 3]", '["a", "b"]'])
def test_damaged_names_are_refused(names: str, tmp_path: Path) -> None:
    generator, path = random_generator(3, (3, 32, 24)), tmp_path / "generator.safetensors"
    header = {"format": "gan-pipeline generator 2", "generator": json.dumps(generator.spec()), "class_names": names}
    save_file({name: tensor.contiguous() for name, tensor in generator.state_dict().items()}, path, header)
    with pytest.raises(UserError, match=f"{path}: not a generator export"):
        load_generator(path)
