"""Shards: exact, reproducible, verified, and never a way to run code."""

from __future__ import annotations

import bz2
import gzip
import io
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data import DataError, Dataset
from pipeline.data.dataset import Reading, Shard
from pipeline.data.resident import load_split
from pipeline.data.shards import copy_mirrored, decode, parse_shard, read_shard, write_shard
from tests.data.numbered import image_numbers, numbered_dataset, numbered_images
from tests.trap import Trap


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def npy(array: object, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=allow_pickle)
    return buffer.getvalue()


def dataset_of(folder: Path, content: bytes, num_images: int, num_classes: int = 10) -> Dataset:
    """A dataset of one shard with these bytes, whose manifest is right about them."""
    (folder / "a.tar").write_bytes(content)
    shard = Shard("a.tar", num_images, len(content), sha256(content).hexdigest())
    return Dataset(folder, "d", (1, 2, 2), tuple(map(str, range(num_classes))), {"train": (shard,)})


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    images, labels = numbered_images(0, 250), np.arange(250)
    first = write_shard(tmp_path / "a.tar", [(images, labels)])
    # A new file of the same content, stored differently in memory.
    second = write_shard(tmp_path / "b.tar", [(np.asfortranarray(images), labels[::-1][::-1])])
    assert (first.num_bytes, first.sha256) == (second.num_bytes, second.sha256)
    assert first.sha256 == sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert {(member.mtime, member.uid, member.mode) for member in archive} == {(0, 0, 0o444)}


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, [230])
    with (dataset.folder / "train-0.tar").open("rb") as file:
        blocks = list(group_by_keys(tar_file_expander([{"url": "train-0.tar", "stream": file}])))
    images = [np.load(io.BytesIO(block["images.npy"]), allow_pickle=False) for block in blocks]
    labels = [np.load(io.BytesIO(block["labels.npy"]), allow_pickle=False) for block in blocks]
    assert [len(block) for block in images] == [100, 100, 30]
    assert np.array_equal(image_numbers(np.concatenate(images)), np.arange(230))
    assert np.array_equal(np.concatenate(labels), np.arange(230) % 10)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_split_is_in_shard_order(tmp_path: Path, labelled: bool) -> None:
    images, labels = load_split(numbered_dataset(tmp_path, [7, 230, 1], labelled=labelled), "train")
    assert (images.dtype, images.shape) == (torch.uint8, (238, 1, 2, 2))
    assert np.array_equal(image_numbers(images.numpy()), np.arange(238))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.arange(238) % 10 if labelled else torch.zeros(238, dtype=torch.int64))


def test_compressed_and_fortran_ordered_shards_are_read(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 2, 2), dtype=np.uint8)
    content = tar({"a.images.npy": npy(np.asfortranarray(images)), "a.labels.npy": npy(np.arange(6, dtype=np.uint8))})
    for packed in (content, gzip.compress(content)):
        samples = parse_shard(packed, "x")
        assert isinstance(samples.images, np.ndarray)
        assert np.array_equal(samples.images, images)
        assert samples.labels is not None
        assert samples.labels.tolist() == list(range(6))


def flip(content: bytes) -> bytes:
    return content[:700] + bytes([content[700] ^ 4]) + content[701:]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (flip, "SHA-256"),
        (lambda content: content[:-1], "bytes, the manifest says"),
        (lambda content: content[:1024], "has 1024 bytes"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: content + b"\0", "bytes, the manifest says"),
        (lambda content: bytes(len(content)), "SHA-256"),
    ],
)
def test_damage_is_named(tmp_path: Path, edit: Callable[[bytes], bytes], words: str) -> None:
    dataset = numbered_dataset(tmp_path, [300, 300])
    path = dataset.folder / "train-1.tar"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(DataError, match=words) as caught:
        load_split(dataset, "train")
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=r"train-1\.tar"):
        load_split(dataset, "train")


def test_no_cut_or_overwritten_header_of_a_tar_is_read_as_a_shorter_one() -> None:
    content = tar({f"{key}.images.npy": npy(numbered_images(key, key + 1)) for key in range(4)})
    end = content.rindex(b"images.npy") + 1024  # the last member's header is followed by less than a block of data
    assert len(parse_shard(content, "x")) == 4
    for length in range(512, len(content) - tarfile.RECORDSIZE // 2, 128):
        if length < end + 1024:
            with pytest.raises(DataError, match="shard x is damaged"):
                parse_shard(content[:length], "x")
    for start in range(512, end, 512):
        with pytest.raises(DataError, match="shard x is damaged"):
            parse_shard(content[:start] + b"\x07" * 512 + content[start + 512 :], "x")


def test_a_gzip_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.samples.UNPACKED_BYTES", 10**6)
    bomb = gzip.compress(tar({"0.images.npy": npy(np.zeros((1, 1, 2000, 2000), np.uint8))}))
    assert len(bomb) < 10_000
    with pytest.raises(DataError, match="it unpacks to more than 1,000,000 bytes"):
        parse_shard(bomb, "bomb")


def test_a_member_that_climbs_or_links_is_never_followed(tmp_path: Path) -> None:
    """Shards are read where they are: nothing is unpacked, so a name is only a key, and a link holds no data."""
    trap = tmp_path / "trap"
    content = tar({f"../{trap}/0.images.npy": npy(numbered_images(0, 3))})
    assert len(parse_shard(content, "climbing")) == 3
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(
        DataError, match=r"shard linked: it holds no image: .*; left out: 1 symbolic link \(first: 0.png\)"
    ):
        parse_shard(buffer.getvalue(), "linked")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "pyd", "pickle", "png", "cls"])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "trap"
    array = npy(np.array([Trap(trap)], dtype=object), allow_pickle=True)
    for poison in (array, pickle.dumps(Trap(trap))):
        assert b"trap" in poison
        members = {"a.images.npy": npy(numbered_images(0, 1)), "a.labels.npy": npy([0])}
        if name in ("png", "cls"):
            members = {"a.png": b"", "a.cls": b"1"}
        dataset = dataset_of(tmp_path, tar(members | {f"a.{name}": poison}), 1)
        if name in ("pyd", "pickle"):
            assert len(load_split(dataset, "train")[0]) == 1  # an unknown member, which nobody looks at
        else:
            with pytest.raises(
                DataError, match=r"is damaged|pickled objects, which are never loaded|neither an integer"
            ):
                load_split(dataset, "train")
        assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()


ONE = npy(numbered_images(0, 1))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "holds no image.*; it is empty"),
        ({"a.txt": b"hello", "a.jxl": b"x"}, r"holds no image.*; left out: 1 imageless sample \(first: a.txt, a.jxl\)"),
        ({"a": b"hello", ".a.png": b"x"}, r"1 file without a suffix \(first: a\), 1 hidden file \(first: \.a\.png\)"),
        ({"a.png": b"x", "b.png": b"x", "a.cls": b"1", "b.cls": b"1"}, "members of its sample a do not follow one"),
        ({"a.images.npy": npy(np.zeros((1, 1, 2, 2), np.float32))}, "a.images.npy is float32"),
        ({"a.images.npy": npy(np.zeros((2, 2), np.uint8))}, r"a.images.npy is uint8 \(2, 2\)"),
        ({"a.images.npy": ONE, "a.labels.npy": npy([1, 2])}, r"labels of a are int64 \(2,\)"),
        ({"a.images.npy": ONE, "a.labels.npy": npy([0.5])}, "labels of a are float64"),
        ({"a.images.npy": ONE, "a.labels.npy": npy([0]), "b.images.npy": ONE}, "some of its images have no label"),
        ({"a.images.npy": ONE, "b.png": b"x"}, "mixes blocks and single images"),
        ({"a.images.npy": npy(np.array([{}]), allow_pickle=True)}, "it holds pickled objects, which are never loaded"),
        ({"a.png": b"x", "a.PNG": b"x"}, "it holds a.PNG more than once"),
        (
            {"a.png": b"x", "a.cls": b"99999999999999999999"},
            "label of its sample a is b'9+', neither an integer nor a name",
        ),
        ({"a.png": b"x", "a.json": b"{"}, "a.json is not JSON"),
        ({"a.png": b"x", "a.json": b'{"label": [0, 1]}'}, r"label of its sample a is \[0, 1\], neither"),
        ({"a.png": b"x", "a.json": b'{"cls": true}'}, "label of its sample a is True, neither"),
        ({"a.png": b"x", "a.json": b'{"label": 0.5}'}, "label of its sample a is 0.5, neither"),
        ({"a.png": b"x", "a.json": b'{"label": "a\\nb"}'}, r"label of its sample a is 'a\\nb', neither"),
        (
            {"a.png": b"x", "a.json": b'{"label": "cat"}', "b.png": b"x", "b.cls": b"3"},
            "some of its labels are names and others numbers",
        ),
        (
            {"a.png": b"x", "a.json": b'{"label": "cat"}', "b.png": b"x", "b.json": b"[]"},
            "some of its images have no label",
        ),
        ({"a.images.npy": ONE[:-1]}, "damaged"),
        ({"a.images.npy": ONE[:90]}, "damaged"),
        ({"a.images.npy": b""}, "damaged"),
        ({"a.png": b"x", "a.cls": b"seven"}, "is b'seven', neither an integer"),
    ],
)
def test_what_is_wrong_in_a_shard_is_named(members: dict[str, bytes], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        parse_shard(tar(members), "the.tar")
    assert "the.tar" in str(caught.value)
    # What can be repaired by a copy of the file is damage alone, and this tar is as its author made it.
    assert ("restore the file" in str(caught.value)) == (words == "damaged")


@pytest.mark.parametrize("name", ["zip", "bzip2", "parquet", "text", "two tars", "sparse gnu", "sparse pax"])
def test_what_is_no_tar_of_samples_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    content = tar({"0.png": bytes(encoded("L", (3, 2)))})
    words = "shard x: it begins with b'{}.*', which is no tar's header: expected a tar, plain or packed with gzip"
    if name == "zip":
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            archive.writestr("0.png", encoded("L", (3, 2)))
        content, words = buffer.getvalue(), words.format("PK")
    elif name == "bzip2":
        content, words = bz2.compress(content), words.format("BZh")
    elif name == "parquet":
        content, words = b"PAR1" + bytes(600), words.format("PAR1")
    elif name == "text":
        content, words = b"<!DOCTYPE html>" * 100, words.format("<!DOCTYPE ht")
    elif name == "two tars":
        content, words = (
            content + tar({"1.png": bytes(encoded("L", (3, 2)))}),
            r"ends at byte \d+, and more follows: tars",
        )
    else:
        words = "shard x: 0.images.npy is stored as a sparse file: pack it again without tar's --sparse"
        (tmp_path / "0.images.npy").write_bytes(npy(np.zeros((1, 1, 512, 2048), np.uint8)))
        with (tmp_path / "0.images.npy").open("r+b") as file:
            file.truncate(128)
            file.truncate(128 + 2**20)  # a hole, which takes no place on the disk
        option = f"--format={name.split()[1]}"
        command = ["tar", "--sparse", option, "-cf", "x.tar", "-C", str(tmp_path), "0.images.npy"]
        subprocess.run(command, cwd=tmp_path, check=True)
        content = (tmp_path / "x.tar").read_bytes()
        assert len(content) < 2**20
    with pytest.raises(DataError, match=words):
        parse_shard(content, "x")


def test_the_samples_are_webdatasets(tmp_path: Path) -> None:
    """A tar of webdataset's own writer, with keys in folders, dots in folders' names, upper case and other members."""
    names = ["a/0", "a/1", "b.c/0", "./d/2", f"{'long/' * 60}{'x' * 120}/3"]
    with TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for number, name in enumerate(names):
            image = Image.fromarray(np.full((2, 3), number, np.uint8))
            image.save(buffer := io.BytesIO(), "PNG")
            members = {"PNG": buffer.getvalue(), "cls": str(number).encode(), "caption.txt": b"a cat", "Json": b"{}"}
            writer.write({"__key__": name} | members)
    content = (tmp_path / "x.tar").read_bytes()
    expected = list(group_by_keys(tar_file_expander([{"url": "x", "stream": io.BytesIO(content)}], eof_value=None)))
    assert [sample["__key__"] for sample in expected] == names
    found = parse_shard(content, "x", Reading(""))
    assert [bytes(image) for image in found.images] == [sample["png"] for sample in expected]
    assert found.labels is not None
    assert found.labels.tolist() == [int(sample["cls"]) for sample in expected] == [0, 1, 2, 3, 4]
    assert decode(found.images, (1, 2, 3), "x")[:, 0, 1, 1].tolist() == [0, 1, 2, 3, 4]
    assert (list(found.image_keys), dict(found.remarks)) == (["png"], {})
    by_folder = parse_shard(content, "x", Reading("", "folder"))
    assert by_folder.labels is not None
    assert by_folder.labels.tolist() == ["a", "a", "b.c", "d", "x" * 120]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_other_tars_are_read_and_what_is_left_out_is_counted(format: int) -> None:
    """Names of more than 100 bytes, which each format stores in its own way; folders, links, devices, hidden files."""
    folder = f"{'f' * 90}/{'ä' * 40}"
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=format, encoding="utf-8") as archive:

        def add(name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), type, link
            archive.addfile(info, io.BytesIO(content))

        add(folder, type=tarfile.DIRTYPE)
        for number in range(3):
            add(f"{folder}/{number}.png", bytes(encoded("L", (3, 2))))
            add(f"{folder}/._{number}.png", b"a Mac's attributes")
        add("a.png", type=tarfile.LNKTYPE, link="0.png")
        add("b.png", type=tarfile.LNKTYPE, link="1.png")
        add("c.png", type=tarfile.SYMTYPE, link="1.png")
        add("d.png", type=tarfile.FIFOTYPE)
        add("README", b"hello")
        add("labels.json", b"{}")
    found = parse_shard(buffer.getvalue(), "x", Reading("", "folder"))
    assert found.labels is not None
    assert found.labels.tolist() == ["ä" * 40] * 3
    assert str(found.remarks) == (
        f"left out: 3 hidden files (first: {folder}/._0.png), 2 hard links (first: a.png), "
        "1 symbolic link (first: c.png), 1 special file (first: d.png), 1 file without a suffix (first: README), "
        "1 imageless sample (first: labels.json)"
    )


def test_of_several_images_of_a_sample_none_is_taken_unasked() -> None:
    content = tar(
        {f"{key}.{suffix}": f"{key} {suffix}".encode() for key in "ab" for suffix in ("seg.png", "JPG", "txt", "png")}
    )
    with pytest.raises(
        DataError, match=r"x: its sample a has 3 images, seg\.png and jpg and png: choose one, .* --image-key seg"
    ):
        parse_shard(content, "x", Reading(""))

    def read(wanted: str) -> list[bytes]:
        return [bytes(image) for image in parse_shard(content, "x", Reading(wanted)).images]

    assert read("png") == [b"a png", b"b png"]
    assert read("seg.png") == [b"a seg.png", b"b seg.png"]
    assert read("webp;jpg;png") == [b"a JPG", b"b JPG"]
    assert read(Reading().image_key) == [b"a png", b"b png"]  # a manifest of an earlier version
    with pytest.raises(
        DataError, match="holds no image: expected samples with one of bmp; left out: 2 imageless samples"
    ):
        read("bmp")
    scattered = tar({"a.png": b"", "b.png": b"", "a.seg.png": b"", "b.seg.png": b""})
    with pytest.raises(DataError, match="the members of its sample a do not follow one another"):
        parse_shard(scattered, "x", Reading(""))
    both = tar({"a.images.npy": ONE, "a.png": b""})
    with pytest.raises(DataError, match=r"has 2 images, images\.npy and png"):
        parse_shard(both, "x", Reading(""))


@pytest.mark.parametrize(
    ("members", "labels", "expected"),
    [
        ([{"cls": b" 7\n"}, {"cls": b"-1"}], "members", [7, -1]),
        ([{"json": b'{"label": 7, "cls": 1}'}, {"json": b'{"cls": 3}'}], "members", [7, 3]),
        ([{"json": b'{"label": null, "cls": 1}'}, {"cls": b"4", "json": b'{"label": 9}'}], "members", [1, 4]),
        ([{"json": b'{"label": "dog"}'}, {"json": b'{"cls": "cat"}'}], "members", ["dog", "cat"]),
        ([{"json": b'{"caption": "a"}'}, {"json": b"[1, 2]"}], "members", None),
        ([{"json": b"{"}, {"cls": b"seven"}], "none", None),
        ([{"json": b"{"}, {"cls": b"seven"}], "folder", ["1", "0"]),
    ],
)
def test_labels_of_single_images_by_hand(
    members: list[dict[str, bytes]], labels: str, expected: list[int] | list[str] | None
) -> None:
    """The first sample lies in folder 1, the second in folder 0."""
    contents = [
        {f"{1 - i}/{i}.{key}": value for key, value in {"png": b"", **each}.items()} for i, each in enumerate(members)
    ]
    found = parse_shard(tar(contents[0] | contents[1]), "x", Reading("", labels))
    assert (None if found.labels is None else found.labels.tolist()) == expected
    with pytest.raises(DataError, match="its sample 0 lies in no folder, but --labels folder"):
        parse_shard(tar({"0.png": b""}), "x", Reading("", "folder"))
    with pytest.raises(DataError, match=r"a\.images\.npy is a block of images: --labels folder is for single images"):
        parse_shard(tar({"c/a.images.npy": ONE}), "x", Reading("", "folder"))


def test_a_shard_that_the_manifest_belies_is_refused(tmp_path: Path) -> None:
    content = tar({"a.images.npy": npy(numbered_images(0, 3)), "a.labels.npy": npy([0, 1, 7])})
    shards = dataset_of(tmp_path, content, 3).shards("train")
    load_split(dataset_of(tmp_path, content, 3), "train")
    with pytest.raises(DataError, match="holds 3 images, the manifest says 4"):
        load_split(dataset_of(tmp_path, content, 4), "train")
    with pytest.raises(DataError, match="it has labels 0 to 7, the dataset 0 to 6"):
        load_split(dataset_of(tmp_path, content, 3, num_classes=7), "train")
    with pytest.raises(DataError, match=r"its images are \(1, 2, 2\), the manifest says \(1, 4, 1\)"):
        read_shard(replace(dataset_of(tmp_path, content, 3), image_shape=(1, 4, 1)), shards[0])
    unlabelled = tar({"a.images.npy": npy(numbered_images(0, 3))})
    with pytest.raises(DataError, match="has no labels"):
        load_split(dataset_of(tmp_path, unlabelled, 3), "train")


def test_mirrored_images_are_reversed_in_both_axes() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    mirrored = np.empty_like(images)
    copy_mirrored(images, mirrored)
    assert mirrored[0].tolist() == [[[5, 4, 3], [2, 1, 0]], [[11, 10, 9], [8, 7, 6]]]
    # Planes of 1, 2, 4 and 8 bytes and of multiples of them; out of memory that is read only, into every second place.
    for height, width in [(1, 1), (3, 5), (2, 5), (6, 6), (2, 4), (28, 28)]:
        stored = np.random.default_rng(0).integers(0, 256, (4, 2, 3, height, width), dtype=np.uint8)
        given = np.frombuffer(b"." + stored.tobytes(), np.uint8, offset=1).reshape(stored.shape)
        places = np.full((4, 4, 3, height, width), 7, np.uint8)
        copy_mirrored(given, places[:, ::2])
        assert np.array_equal(places[:, ::2], stored[:, :, :, ::-1, ::-1])
        assert (places[:, 1::2] == 7).all()


def test_a_shard_is_read_by_its_own_headers_whatever_was_read_before() -> None:
    one, other = npy(numbered_images(0, 3)), npy(numbered_images(0, 90))
    first, second, renamed = (
        tar({f"{key}.images.npy": block for key, block in blocks.items()})
        for blocks in ({"a": one, "b": other}, {"a": other, "b": one}, {"c": one, "d": other})
    )
    assert len(first) == len(second) == len(renamed)
    expected = {first: [*range(3), *range(90)], second: [*range(90), *range(3)], renamed: [*range(3), *range(90)]}
    for content in (first, second, renamed, first, first, renamed, second):
        images = parse_shard(content, "x").images
        assert isinstance(images, np.ndarray)
        assert image_numbers(images).tolist() == expected[content]
    with pytest.raises(DataError, match="more follows"):  # its layout is known, but for a byte behind the members
        parse_shard(first[:-1] + b"\1", "x")


def encoded(mode: str, size: tuple[int, int], format: str = "PNG") -> memoryview:
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else (10, 20, 30)).save(buffer, format)
    return memoryview(buffer.getvalue())


def test_images_decode_to_the_manifest_shape() -> None:
    both = [encoded("L", (3, 2)), encoded("RGB", (3, 2))]
    colour = decode(both, (3, 2, 3), "x")
    assert colour.dtype == np.uint8
    assert colour.shape == (2, 3, 2, 3)
    assert colour[0].ravel().tolist() == [200] * 18
    assert colour[1, :, 1, 2].tolist() == [10, 20, 30]
    grey = decode(both, (1, 2, 3), "x")
    assert grey.shape == (2, 1, 2, 3)
    assert grey[:, 0, 0, 0].tolist() == [200, 18]  # 0.299 R + 0.587 G + 0.114 B
    assert (
        np.abs(decode([encoded("RGB", (3, 2), "JPEG")], (3, 2, 3), "x")[0, :, 0, 0].astype(int) - [10, 20, 30]).max()
        < 4
    )
    with pytest.raises(DataError, match="x is damaged: an image is 2 x 3, not 3 x 2"):
        decode(both, (3, 3, 2), "x")
    with pytest.raises(DataError, match="x is damaged"):
        decode([both[0][:40]], (1, 2, 3), "x")
