"""dataset.json: what is wrong with it is named, and nothing in it runs a command unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig
from pipeline.data import DataError, load_dataset, open_dataset
from pipeline.data.dataset import counted, to_json
from pipeline.data.resident import load_split
from pipeline.data.shards import read_shard
from pipeline.errors import UserError
from tests.data.numbered import numbered_dataset


def test_a_manifest_says_what_was_written(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, [3, 5])
    assert (dataset.name, dataset.image_shape, dataset.num_classes) == ("numbers", (1, 2, 2), 10)
    assert dataset.num_images("train") == 8
    assert [(shard.name, shard.num_images) for shard in dataset.shards("train")] == [
        ("train-0.tar", 3),
        ("train-1.tar", 5),
    ]
    assert json.loads((dataset.folder / "dataset.json").read_text()) == to_json(dataset)
    with pytest.raises(DataError, match=r"numbers has no test split: it has train"):
        dataset.num_images("test")


def test_counts_are_said_in_english() -> None:
    assert [counted(count, "class") for count in (0, 1, 2000)] == ["0 classes", "1 class", "2,000 classes"]
    assert (counted(1, "image"), counted(2, "image")) == ("1 image", "2 images")


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, [3, 5])
    shutil.copytree(dataset.folder, tmp_path / "elsewhere")
    assert load_dataset(tmp_path / "elsewhere").fingerprint == dataset.fingerprint
    shards = dataset.shards("train")
    moved = replace(dataset, splits={"train": tuple(replace(shard, name=f"/mnt/{shard.name}") for shard in shards)})
    assert moved.fingerprint == dataset.fingerprint
    others = [
        replace(dataset, name="x"),
        replace(dataset, class_names=dataset.class_names[::-1]),
        replace(dataset, image_shape=(1, 4, 1)),
        replace(dataset, splits={"train": shards[::-1]}),
        replace(dataset, splits={"train": shards, "test": shards}),
        replace(dataset, splits={"train": (replace(shards[0], sha256="0" * 64), shards[1])}),
    ]
    assert len({other.fingerprint for other in others} | {dataset.fingerprint}) == len(others) + 1


def test_what_the_images_are_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Older manifests do not say it: they are read, and runs on them and cached features of theirs stay theirs."""
    dataset = numbered_dataset(tmp_path, [3, 5])
    path = dataset.folder / "dataset.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("kind") == "own"
    shards = [[shard[key] for key in ("num_images", "num_bytes", "sha256")] for shard in manifest["splits"]["train"]]
    content = json.dumps(manifest | {"splits": {"train": shards}}, sort_keys=True)
    for more, kind in (({}, "own"), ({"kind": "cifar10"}, "cifar10")):
        path.write_text(json.dumps(manifest | more))
        assert load_dataset(dataset.folder).kind == kind
        assert load_dataset(dataset.folder).fingerprint == sha256(content.encode()).hexdigest()
    mnist: dict[str, object] = {"name": "mnist", "image_shape": [1, 28, 28], "class_names": list("0123456789")}
    others: list[tuple[dict[str, object], str]] = [
        ({}, "mnist"),
        ({"kind": "own"}, "own"),
        ({"image_shape": [1, 2, 2]}, "own"),  # the user's images, which an older version wrote under that name
        ({"class_names": list("abc")}, "own"),
    ]
    for changes, kind in others:
        path.write_text(json.dumps(manifest | mnist | changes))
        assert load_dataset(dataset.folder).kind == kind


def change(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        manifest[key] = value

    return apply


def change_shard(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"][1][key] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("version", 2), "version 2 .*reads version 1"),
        (change("version", True), "version is True"),
        (change("format", "tfds"), "version 1"),
        (change("image_shape", [28, 28]), r"image_shape is \[28, 28\]"),
        (change("image_shape", [1, 28, 0]), r"image_shape\[2\] is 0"),
        (change("image_shape", [1, 2**20, 2**20]), r"image_shape is \[1, 1048576, 1048576\]"),
        (change("image_shape", "1x2x2"), "image_shape is '1x2x2'"),
        (change("class_names", ["a", 2]), r"class_names\[1\] is 2"),
        (change("kind", "letters"), "kind is 'letters', not one of mnist, fashion_mnist, cifar10, stacked_mnist, own"),
        (change("kind", 7), "kind is 7"),
        (change("reading", {"image_key": "png", "labels": "mine"}), "reading.labels is 'mine', not one of members, f"),
        (change("reading", {"image_key": 7, "labels": "none"}), "reading.image_key is 7"),
        (change("reading", {}), "reading.image_key is missing"),
        (change("reading", None), "reading is None, not of type dict"),
        (change("splits", {}), "splits.train is missing"),
        (change("splits", {"train": []}), "splits.train lists no shard"),
        (change("splits", {"train": [7]}), r"splits.train\[0\] is 7, not of type dict"),
        (change_shard("name", "a\0b"), r"the shard's name 'a.x00b' holds control characters"),
        (change_shard("num_images", -1), r"splits.train\[1\].num_images is -1"),
        (change_shard("num_images", True), r"splits.train\[1\].num_images is True"),
        (change_shard("num_bytes", "9"), r"splits.train\[1\].num_bytes is '9'"),
        (lambda manifest: manifest.pop("name"), "name is missing"),
        (lambda manifest: manifest["splits"]["train"][0].pop("sha256"), r"splits.train\[0\].sha256 is missing"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    dataset = numbered_dataset(tmp_path, [3, 5])
    path = dataset.folder / "dataset.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=words) as caught:
        load_dataset(dataset.folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'{"version": 1}', b"\xff\xfe\x00", b"[" * 10**5])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    dataset = numbered_dataset(tmp_path, [3])
    path = dataset.folder / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        load_dataset(dataset.folder)


def test_every_cut_of_a_manifest_is_refused(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, [3])
    path = dataset.folder / "dataset.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"dataset\.json"):
            load_dataset(dataset.folder)


def test_a_dataset_under_the_root_goes_by_its_name(tiny_dataset: Path) -> None:
    named = open_dataset(DataConfig(dataset="tiny", root=str(tiny_dataset.parent)))
    assert named == load_dataset(tiny_dataset)
    assert open_dataset(DataConfig(dataset=str(tiny_dataset), root="elsewhere")) == named
    with pytest.raises(DataError, match=r"^tiny/dataset.json does not exist"):
        open_dataset(DataConfig(dataset="tiny", root="elsewhere"))


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"nowhere/dataset.json does not exist: prepare it .* or give mnist, fashion_mnist, cifar10, .* or",
    ):
        open_dataset(DataConfig(dataset=str(tmp_path / "nowhere")))
    (tmp_path / "mine").mkdir()
    for name, root in ((tmp_path / "minee", "data"), ("minee", tmp_path)):
        with pytest.raises(
            DataError, match=rf"minee/dataset.json does not exist \(did you mean {tmp_path}/mine\?\): prep"
        ):
            open_dataset(DataConfig(dataset=str(name), root=str(root)))
    (tmp_path / "file").touch()
    for name, source in (("a.npz", "npz"), ("a.parquet", "parquet"), ("a.tar", "shards")):
        (path := tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name} is a file; run gan-pipeline prepare {source} {path} --name NAME"):
            open_dataset(DataConfig(dataset=str(path)))
    for name, kind in (("cats/1.JPG", "images"), ("tars/1.tar", "")):
        folder = tmp_path / name
        folder.parent.mkdir()
        folder.touch()
        words = (
            f"run gan-pipeline prepare folder {folder.parent} --name NAME, then data.dataset NAME"
            if kind
            else "prepare it"
        )
        with pytest.raises(DataError, match=rf"dataset\.json does not exist: .*{words}"):
            open_dataset(DataConfig(dataset=str(folder.parent)))


def rename_shard(folder: Path, name: str) -> None:
    path = folder / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"][0]["name"] = name
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("scheme", ["pipe", "PIPE", "gs", "htgs", "hf", "ais", "sftp", "ftps", "scp"])
def test_urls_that_run_commands_are_refused(tmp_path: Path, scheme: str) -> None:
    dataset = numbered_dataset(tmp_path, [3])
    rename_shard(dataset.folder, f"{scheme}:touch {tmp_path / 'trap'}")
    with pytest.raises(UserError, match=r"run a command.*data.allow_shell_urls"):
        open_dataset(DataConfig(dataset=str(dataset.folder)))
    with pytest.raises(UserError, match=r"run a command"):
        load_dataset(f"pipe:touch {tmp_path / 'trap'};")
    assert not (tmp_path / "trap").exists()


def test_every_scheme_that_webdataset_starts_a_process_for_is_known() -> None:
    from webdataset.gopen import gopen_schemes

    # A new one must be looked at; http and https are opened without a process here.
    assert set(gopen_schemes) == {
        "__default__",
        "pipe",
        "http",
        "https",
        "ais",
        "sftp",
        "ftps",
        "scp",
        "gs",
        "htgs",
        "hf",
    }


def test_unknown_schemes_are_refused(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, [3])
    rename_shard(dataset.folder, "s3://bucket/a.tar")
    with pytest.raises(UserError, match=r"dataset\.json: s3:.*: nothing here opens s3"):
        load_dataset(dataset.folder, allow_shell_urls=True)


def test_an_allowed_pipe_is_read_and_its_failure_named(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, [30, 20])
    expected = load_split(dataset, "train")
    rename_shard(dataset.folder, f"pipe:cat '{dataset.folder}/train-0.tar'")
    allowed = open_dataset(DataConfig(dataset=str(dataset.folder), allow_shell_urls=True))
    for found, wanted in zip(load_split(allowed, "train"), expected, strict=True):
        assert found.equal(wanted)
    rename_shard(dataset.folder, "pipe:exit 3")
    broken = load_dataset(dataset.folder, allow_shell_urls=True)
    with pytest.raises(DataError, match="pipe:exit 3"):
        read_shard(broken, broken.shards("train")[0])
