"""Every reader of bytes from outside, under mutations of what it reads well: it succeeds, or refuses in one line that
names the file. FUZZ_CASES sets how many mutations of each are tried."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from pipeline.checks.settings import Plan, check_run_folder
from pipeline.config import Config, RunConfig, make_parser, parse, to_yaml
from pipeline.data import Dataset, load_dataset
from pipeline.data.dataset import Remarks
from pipeline.data.images import open_images
from pipeline.data.prepare import index_shards
from pipeline.data.prepare.npz import load_npz
from pipeline.data.shards import read_shard
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.export.generator_file import load_generator, save_export
from pipeline.reporting.read import read_run
from pipeline.storage.checkpoint import CheckpointWriter, newest_intact
from pipeline.storage.lock import lock_run
from pipeline.storage.run_folder import RunFolder
from tests.data.numbered import numbered_dataset
from tests.export.generators import random_generator

CASES = int(os.environ.get("FUZZ_CASES", "60"))


class Reader(NamedTuple):
    make: Callable[[Path], Path]
    """Makes what is read in a folder, and returns the file to mutate."""
    read: Callable[[Path], object]
    """Reads that file."""


@cache
def parser() -> object:
    return make_parser("fuzz")


def config_file(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(to_yaml(Config(run=RunConfig(name="x"))))
    return path


def read_config(path: Path) -> object:
    return parse(parser(), ["--config", str(path)])  # type: ignore[arg-type]


def run_folder(folder: Path) -> RunFolder:
    run = RunFolder(folder / "run")
    run.evaluation.mkdir(parents=True)
    run.config.write_text(to_yaml(Config(run=RunConfig(name="run", root=str(folder)))))
    run.environment.write_text(json.dumps({"dataset_fingerprint": "", "git_commit": None, "device": "CPU"}))
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "critic_loss": 0.1, "elapsed_seconds": 1.5})
    scores = {"fid": 3.0, "fid_floor": 1.0, "fid_interval": [2.0, 4.0], "fid_per_class": {"0": 1.0}}
    run.scores(3).write_text(json.dumps({"step": 3, "num_images": 10, "features": {"mnist": scores}}))
    return run


def read_run_settings(path: Path) -> object:
    return check_run_folder(Plan(Config(run=RunConfig(name="run", root=str(path.parents[1]))), 1))


def checkpoint(folder: Path) -> RunFolder:
    run = run_folder(folder)
    writer = CheckpointWriter(run, Ranks(), keep_last=3, keep_every=None)
    writer.save({"critic.weight": torch.arange(12.0).view(3, 4)}, 7, {"elapsed_seconds": 1.0})
    writer.finish()
    return run


def manifest(folder: Path) -> Path:
    return numbered_dataset(folder, [5, 7]).folder / "dataset.json"


def shard(folder: Path) -> Path:
    return numbered_dataset(folder, [5]).folder / "train-0.tar"


def read_manifest(path: Path) -> object:
    dataset = load_dataset(path.parent)
    return [read_shard(dataset, each) for shards in dataset.splits.values() for each in shards]


def read_unchecked_shard(path: Path) -> object:
    return index_shards(path.parent, "again", {"train": [str(path)]})


def photos(folder: Path) -> Path:
    Image.new("L", (6, 6), 7).save(buffer := io.BytesIO(), "PNG")
    with TarWriter(str(folder / "photos.tar"), encoder=False) as writer:
        for number, label in enumerate((b'{"label": "cat"}', b'{"label": "dog"}')):
            writer.write({"__key__": f"{number}", "png": buffer.getvalue(), "json": label})
    return folder / "photos.tar"


def npz(folder: Path) -> Path:
    np.savez(folder / "in.npz", images=np.arange(5 * 36, dtype=np.uint8).reshape(5, 6, 6), labels=np.arange(5))
    return folder / "in.npz"


def png(folder: Path) -> Path:
    (folder / "images").mkdir()
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)).save(folder / "images" / "0.png")
    return folder / "images" / "0.png"


def read_png(path: Path) -> object:
    images = open_images(path.parent, Dataset(path.parent, "x", (1, 6, 6), (), {}), Remarks())
    return images.read(np.arange(1))


def export(folder: Path) -> Path:
    save_export(random_generator(3, (1, 8, 8)), folder / "generator.safetensors", {"step": 1})
    return folder / "generator.safetensors"


def lock(folder: Path) -> Path:
    path = RunFolder(folder).lock
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 5, "started": 1.0}))
    return path


def read_lock(path: Path) -> object:
    held = lock_run(RunFolder(path.parent))
    held.release()
    return held


READERS = {
    "config.yaml": Reader(config_file, read_config),
    "a run's config.yaml": Reader(lambda folder: run_folder(folder).config, read_run_settings),
    "environment.json": Reader(lambda folder: run_folder(folder).environment, read_run_settings),
    "metrics.jsonl": Reader(
        lambda folder: run_folder(folder).metrics, lambda path: RunFolder(path.parent).trim_metrics(2)
    ),
    "metrics.jsonl for the report": Reader(
        lambda folder: run_folder(folder).metrics, lambda path: read_run(path.parent).best
    ),
    "config.yaml for the report": Reader(
        lambda folder: run_folder(folder).config, lambda path: read_run(path.parent).differences
    ),
    "evaluation.json": Reader(
        lambda folder: run_folder(folder).scores(3), lambda path: read_run(path.parent.parent).best
    ),
    "manifest.json": Reader(
        lambda folder: checkpoint(folder).checkpoint(7) / "manifest.json",
        lambda path: newest_intact(RunFolder(path.parents[2])),
    ),
    "a checkpoint's shard": Reader(
        lambda folder: next(checkpoint(folder).checkpoint(7).glob("*.safetensors")),
        lambda path: newest_intact(RunFolder(path.parents[2])),
    ),
    "dataset.json": Reader(manifest, read_manifest),
    "a dataset's shard": Reader(shard, lambda path: read_manifest(path.with_name("dataset.json"))),
    "another's shard": Reader(shard, read_unchecked_shard),
    "a tar of images": Reader(photos, read_unchecked_shard),
    "an .npz": Reader(npz, load_npz),
    "an image": Reader(png, read_png),
    "an export": Reader(export, lambda path: load_generator(path, "ema")),
    "a lock": Reader(lock, read_lock),
}


def mutations(content: bytes, chance: random.Random) -> Iterator[bytes]:
    """What a bad disk, a bad editor and a bad neighbour make of a file."""
    numbers = [b"0", b"-1", b"1e308", b"NaN", b"99999999999999999999", b"null", b"[]", b"{}", b'"\\u0000"', b"true"]
    while True:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            at, length = chance.randrange(len(changed) + 1), chance.choice((1, 2, 4, 8, 100))
            match chance.randrange(7):
                case 0:
                    changed[at : at + length] = b""
                case 1:
                    changed[at:at] = chance.randbytes(length)
                case 2:
                    changed[at : at + length] = chance.choice((b"\x00", b"\xff", b"[", b"{")) * length
                case 3:
                    changed[at : at + length] = chance.randbytes(length)
                case 4:
                    del changed[at:]
                case 5:  # a number becomes another
                    digits = [i for i, byte in enumerate(changed) if 48 <= byte < 58] or [0]
                    start = chance.choice(digits)
                    changed[start : start + 1] = chance.choice(numbers)
                case 6:
                    start = chance.randrange(len(changed) + 1)
                    changed[at:at] = changed[start : start + length]
        yield bytes(changed)


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_any_content_is_read_or_refused_by_name(name: str, tmp_path: Path) -> None:
    path = READERS[name].make(tmp_path)
    content, chance = path.read_bytes(), random.Random(name)
    READERS[name].read(path)  # as it is, it is read
    others = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file != path}
    for _, changed in zip(range(CASES), mutations(content, chance), strict=False):
        path.write_bytes(changed)
        line = path.name
        signal.alarm(60)  # what hangs ends the test run here, with a line that tells where
        try:
            READERS[name].read(path)
        except UserError as error:
            line = str(error)
        except BaseException as error:
            raise AssertionError(f"{name}: {changed!r}") from error
        finally:
            signal.alarm(0)
        named = path.name in line or path.parent.name in line or re.match(r"[a-z]+\.[a-z_.]+ is ", line)
        assert named, (line, changed)
        assert len(line.splitlines()) == 1, (line, changed)
        for file, before in others.items():
            if not file.exists() or file.read_bytes() != before:
                file.write_bytes(before)
