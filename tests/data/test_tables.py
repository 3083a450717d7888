"""Datasets of the Hugging Face Hub's package, of torchvision, and parquet files."""

from __future__ import annotations

import io
import json
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import Table
from pyarrow.parquet import write_table
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST, FakeData
from torchvision.transforms import ToTensor

from pipeline import prepare_dataset
from pipeline.data import DataError, Dataset, load_dataset
from pipeline.data.prepare import index_shards
from pipeline.data.resident import load_split
from pipeline.errors import UserError
from tests.data.test_prepare import run, tar_of

NAMES = ["cat", "dog", "cow"]
COLUMNS = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(number: int) -> Image.Image:
    """4 x 4 pixels of this grey."""
    return Image.new("L", (4, 4), number)


def hub_dataset(start: int, stop: int) -> datasets.Dataset:
    """Pictures of these numbers; the class is the number modulo 3."""
    numbers = range(start, stop)
    rows = {"image": list(map(picture, numbers)), "label": [number % 3 for number in numbers]}
    return datasets.Dataset.from_dict(rows, features=COLUMNS)


def numbers_and_labels(dataset: Dataset, split: str = "train") -> dict[int, int]:
    images, labels = load_split(dataset, split)
    assert (images == images[:, :1, :1, :1]).all()
    return dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


EXPECTED = {number: number % 3 for number in range(30)}


def test_what_save_to_disk_wrote_is_prepared(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": hub_dataset(0, 30), "validation": hub_dataset(30, 40)})
    both.save_to_disk(tmp_path / "saved")
    arguments = ("hf", tmp_path / "saved", "--test", "validation", "--name", "x", "--root", tmp_path)
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    dataset = load_dataset(tmp_path / "x")
    assert (dataset.image_shape, dataset.class_names) == ((1, 4, 4), ("cat", "dog", "cow"))
    assert numbers_and_labels(dataset) == EXPECTED
    assert numbers_and_labels(dataset, "test") == {number: number % 3 for number in range(30, 40)}
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "x"}
    assert "is there already, complete and verified" in run(*arguments).stderr
    result = run("hf", tmp_path / "saved", "--split", "test", "--name", "y", "--root", tmp_path)
    assert result.stderr == (
        f"error: cannot read the split test of {tmp_path}/saved: it has the splits train, validation\n"
    )
    hub_dataset(0, 30).save_to_disk(tmp_path / "single")
    result = run("hf", tmp_path / "single", "--name", "z", "--root", tmp_path, "--label", "none", "--size", 8)
    assert load_dataset(tmp_path / "z").class_names == (), result.stderr
    assert load_dataset(tmp_path / "z").image_shape == (1, 8, 8)


def test_parquet_files_give_the_same_dataset_however_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    hub_dataset(0, 18).to_parquet(tmp_path / "in" / "train-0.parquet")
    hub_dataset(18, 30).to_parquet(tmp_path / "in" / "train-1.parquet")
    hub_dataset(30, 33).to_parquet(tmp_path / "test.parquet")
    result = run(
        *("parquet", tmp_path / "in" / "train-{0..1}.parquet", "--test", tmp_path / "test.parquet"),
        *("--name", "x", "--root", tmp_path / "1", "--images_per_shard", 20),
    )
    assert result.returncode == 0, result.stderr
    dataset = load_dataset(tmp_path / "1" / "x")
    assert dataset.class_names == ("cat", "dog", "cow")
    assert [shard.num_images for shard in dataset.shards("train")] == [20, 10]
    assert numbers_and_labels(dataset) == EXPECTED
    assert numbers_and_labels(dataset, "test") == {30: 0, 31: 1, 32: 2}
    run("parquet", tmp_path / "in", "--name", "x", "--root", tmp_path / "2")
    run("hf", tmp_path / "in", "--name", "x", "--root", tmp_path / "3")
    ours = prepare_dataset(hub_dataset(0, 30), "x", tmp_path / "4")
    streamed = prepare_dataset(hub_dataset(0, 30).to_iterable_dataset(), "x", tmp_path / "5")
    fingerprints = {load_dataset(tmp_path / str(number) / "x").fingerprint for number in (2, 3)}
    assert fingerprints == {ours.fingerprint, streamed.fingerprint}


def test_columns_of_parquet_files_that_datasets_did_not_write(tmp_path: Path) -> None:
    def png(number: int) -> bytes:
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        return buffer.getvalue()

    table = Table.from_pydict({"jpeg": [png(9), png(4), png(7)], "kind": ["b", "a", "b"], "text": ["", "", ""]})
    write_table(table, tmp_path / "a.parquet")
    arguments = ("parquet", tmp_path / "a.parquet", "--image", "jpeg", "--root", tmp_path)
    assert run(*arguments, "--label", "kind", "--name", "x").returncode == 0
    assert load_dataset(tmp_path / "x").class_names == ("a", "b")
    assert numbers_and_labels(load_dataset(tmp_path / "x")) == {9: 1, 4: 0, 7: 1}
    result = run(*arguments, "--name", "y")
    assert result.stderr == (
        f"error: {tmp_path}/a.parquet has the columns 'jpeg', 'kind', 'text': name that of the labels by --label "
        "(none: there are none)\n"
    )
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    result = run("parquet", tmp_path / "b.parquet", "--name", "y", "--root", tmp_path)
    assert f"error: {tmp_path}/b.parquet cannot be read as a parquet file: " in result.stderr
    write_table(Table.from_pydict({"image": [png(1), b"no image"], "label": [0, 1]}), tmp_path / "c.parquet")
    result = run("parquet", tmp_path / "c.parquet", "--name", "y", "--root", tmp_path)
    assert f"row 1 of {tmp_path}/c.parquet is damaged or not an image: Pillow recognises no format" in result.stderr
    assert not list(tmp_path.glob("*y/*"))


def write_mnist(root: Path) -> None:
    (root / "MNIST" / "raw").mkdir(parents=True)
    for stem, count in (("train", 30), ("t10k", 6)):
        pixels = np.arange(count, dtype=np.uint8).repeat(16)
        header = struct.pack(">4i", 0x803, count, 4, 4)
        (root / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 3).astype(np.uint8)
        header = struct.pack(">2i", 0x801, count)
        (root / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_datasets_of_torch_and_torchvision(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for number, transform in enumerate((None, ToTensor())):
        splits = {name: MNIST(str(tmp_path), train=name == "train", transform=transform) for name in ("train", "test")}
        dataset = prepare_dataset(splits, f"mnist-{number}", tmp_path)
        assert dataset.class_names[7] == "7 - seven"
        assert numbers_and_labels(dataset) == EXPECTED
        assert numbers_and_labels(dataset, "test") == {number: number % 3 for number in range(6)}
    fake = prepare_dataset(FakeData(20, (3, 6, 6), 2, random_offset=3), "fake", tmp_path)
    assert (fake.image_shape, fake.num_images("train"), fake.class_names) == ((3, 6, 6), 20, ("0", "1"))
    images = torch.arange(30, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    for number, tensors in enumerate((images, images.permute(0, 2, 3, 1), images / 255, images[:, 0])):
        dataset = prepare_dataset(TensorDataset(tensors, torch.arange(30) % 3), f"tensors-{number}", tmp_path)
        assert numbers_and_labels(dataset) == EXPECTED


def test_rows_of_any_iterable(tmp_path: Path) -> None:
    unlabelled = prepare_dataset((picture(number) for number in range(5)), "x", tmp_path)
    assert (unlabelled.class_names, set(numbers_and_labels(unlabelled).values())) == ((), {0})
    rows = [{"img": picture(10), "kind": "dog"}, {"img": picture(9), "kind": "Cat"}]
    named = prepare_dataset({"train": rows, "test": rows[1:]}, "y", tmp_path, columns=("img", "kind"))
    assert (named.class_names, numbers_and_labels(named)) == (("Cat", "dog"), {10: 1, 9: 0})
    colours = prepare_dataset([picture(3), Image.new("RGB", (4, 4), (5, 5, 5))], "z", tmp_path)
    assert (colours.image_shape, numbers_and_labels(colours)) == ((3, 4, 4), {3: 0, 5: 0})


def test_images_are_dropped_when_they_are_read(tmp_path: Path) -> None:
    alive: list[weakref.ref[Image.Image]] = []

    def rows() -> Iterator[tuple[Image.Image, int]]:
        for number in range(200):
            alive.append(weakref.ref(image := picture(number)))
            yield image, number % 3
            del image
            assert sum(read() is not None for read in alive) <= 2

    assert prepare_dataset(rows(), "x", tmp_path).num_images("train") == 200


class Endless(torch.utils.data.Dataset[Any]):
    """It has a length, and does not raise IndexError beyond it."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture(index), 0


class Breaking(Endless):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture(index), 1 // (2 - index)


def test_a_torch_dataset_ends_with_its_length(tmp_path: Path) -> None:
    assert prepare_dataset(Endless(), "x", tmp_path).num_images("train") == 3


WRONG = {
    "row 2 of the train split cannot be read: ZeroDivisionError": Breaking(),
    "the train split has no rows": [],
    r"row 0 of the train split has 'image', 'kind', not 'label': name the two by columns=\(IMAGE, LABEL or 'none'\)": [
        {"image": picture(0), "kind": 0}
    ],
    "give those that are 'train' and maybe 'test'": {"test": [picture(0)]},
    r"row 1 of .* is float64 \(2, 2\) with values from -1.0 to 1.0: give .* not normalised": [
        (np.eye(2), 0),
        (2 * np.eye(2) - 1, 0),
    ],
    r"row 0 of .*: the image is int64 \(3, 5, 3\): which axis is the channels": [np.ones((3, 5, 3), np.int64)],
    "no pixel of the train split is above 1": [np.eye(4, dtype=np.uint8)],
    r"the label of row 0 .* is 1.5, neither an integer nor a name": [(picture(0), 1.5)],
    "the label of row 1 of the train split is 'dog', that of the image before it 0": [
        (picture(0), 0),
        (picture(0), "dog"),
    ],
    "the train split: the labels, from 1 to 1, .*: number the classes 0 to 0": [(picture(0), 1)],
    r"row 1 of the train split is 8 x 8 \(height x width\), those before it are 4 x 4: .* --size N": [
        picture(0),
        Image.new("L", (8, 8)),
    ],
    r"the label of row 3 .* is -1, none of its classes, 0 to 2: .*--label none": hub_dataset(0, 3).map(
        lambda row: row, features=COLUMNS
    ),
    "the classes of the test split are not those of the train split": {
        "train": hub_dataset(0, 3),
        "test": hub_dataset(0, 3).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"])),
    },
    "the test images show class 1, the training images do not": {
        "train": [(picture(0), 0)],
        "test": [(picture(0), 0), (picture(0), 1)],
    },
    "the test images show 'cow', the training images do not": {
        "train": [(picture(0), "cat")],
        "test": [(picture(0), "cow")],
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_named_and_leaves_nothing(words: str, tmp_path: Path) -> None:
    rows = WRONG[words]
    if "is -1" in words:
        rows = datasets.concatenate_datasets([rows, hub_dataset(0, 1).map(lambda row: {"label": -1}, features=COLUMNS)])
    with pytest.raises(UserError, match=words):
        prepare_dataset(rows, "x", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_classes_that_no_training_image_shows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = hub_dataset(0, 9).filter(lambda row: row["label"] == 1)
    dataset = prepare_dataset(rows, "x", tmp_path)
    assert dataset.num_classes == len(NAMES) == 3
    assert f"without a training image: 2 classes (first: {NAMES[0]!r})" in capsys.readouterr().err
    spelled = "cafe\N{COMBINING ACUTE ACCENT}", "two  words", "dog"
    assert prepare_dataset([(picture(0), name) for name in spelled], "y", tmp_path).num_classes == 3
    assert "without" not in capsys.readouterr().err


def test_the_hub_is_asked_for_what_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*origin: str, split: str, streaming: bool) -> datasets.Dataset:
        if "none" in origin:
            raise ConnectionError("Couldn't reach 'someone/none' on the Hub")
        assert (origin, split, streaming) == (("someone/pets", "small"), "train[:3]", False)
        return hub_dataset(0, 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = run("hf", "someone/pets", "small", "--split", "train[:3]", "--name", "x", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("hf", "none", "--name", "y", "--root", tmp_path)
    assert result.stderr == ("error: cannot read the split train of none: Couldn't reach 'someone/none' on the Hub\n")


def test_shards_as_img2dataset_writes_them_are_read_where_they_are(tmp_path: Path) -> None:
    described = {"caption": "a cat", "url": "https://example.org/a.jpg", "status": "success", "width": 5, "exif": "{}"}
    members: dict[str, object] = {}
    for number in range(3):
        key = f"{number:09d}"
        members |= {f"{key}.jpg": number, f"{key}.json": json.dumps(described | {"key": key}), f"{key}.txt": "a cat"}
    tar_of(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    write_table(Table.from_pydict({"url": ["https://example.org/a.jpg"]}), tmp_path / "00000.parquet")
    dataset = index_shards(tmp_path, "x", {"train": [str(tmp_path)]})
    assert (dataset.image_shape, dataset.class_names, dataset.num_images("train")) == ((1, 3, 5), (), 3)
    with pytest.raises(DataError, match="name that of the images by --image"):
        run_parquet(tmp_path)


def run_parquet(folder: Path) -> None:
    """img2dataset's parquet files hold what it knows of the images, not the images."""
    raise DataError(run("parquet", folder / "00000.parquet", "--name", "y", "--root", folder).stderr)
