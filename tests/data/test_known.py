"""Fashion-MNIST, CIFAR-10 and Stacked MNIST, with files that are made here. MNIST's are in test_prepare.py."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import md5, sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.datasets import FashionMNIST

from pipeline.checks.machine import find_dataset
from pipeline.config import Config, DataConfig
from pipeline.data import KINDS, KNOWN, DataError, Dataset, load_dataset, open_dataset
from pipeline.data.prepare import index_shards, known, prepare_folder, prepare_known, prepare_npz
from pipeline.data.resident import load_split
from pipeline.errors import UserError
from tests.data.numbered import numbered_dataset
from tests.data.test_prepare import Mirror, run, serving, snapshot

COUNTS = {"train": 40, "test": 20}
CIFAR_NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin", "batches.meta.txt"]


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(known, "HOME", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "*")


def test_a_known_dataset_has_a_kind() -> None:
    assert [*KNOWN, "own"] == list(KINDS)
    assert list(KNOWN) == list(known.DATASETS)


@pytest.mark.parametrize("name", ["mnist", "MNIST", "Fashion_MNIST", "fa\u017fhion_mnist", "cifar10", "CIFAR10"])
def test_no_images_of_ones_own_take_a_known_datasets_place(name: str, tmp_path: Path) -> None:
    """Nothing is read or written: the sources do not even exist."""
    refusal = f"the name {name!r} belongs to the known dataset"
    for command in ("folder", "npz", "shards"):
        result = run(command, tmp_path / "nothing", "--name", name, "--kind", "mnist", "--root", tmp_path / "data")
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert refusal in line
    for prepare in (prepare_folder, prepare_npz):
        with pytest.raises(UserError, match=refusal):
            prepare(tmp_path / "data", name, {"train": tmp_path / "nothing"})
    with pytest.raises(UserError, match=refusal):
        index_shards(tmp_path / "data", name, {"train": ["nothing"]})
    assert not list(tmp_path.iterdir())


def test_other_images_in_a_known_datasets_place_are_not_taken_for_it(tmp_path: Path) -> None:
    """An earlier version, or a copy, put them there; by their path they are opened as what they are."""
    folder = numbered_dataset(tmp_path, [10], name="mnist").folder
    config = DataConfig(dataset="mnist", root=str(tmp_path))
    for find in (open_dataset, lambda config: find_dataset(Config(data=config))):
        with pytest.raises(
            DataError, match=r"mnist holds images of kind own, not mnist: name them by their path"
        ) as caught:
            find(config)
        assert str(folder) in str(caught.value)
    assert open_dataset(DataConfig(dataset=str(folder))).kind == "own"
    manifest = json.loads((folder / "dataset.json").read_text())
    del manifest["kind"]
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="holds images of kind own, not mnist"):
        open_dataset(config)


# -------------------------------------------------------------------------------------------------------- Fashion-MNIST


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four small IDX files, which count as the published ones; image i shows (31 i) % 256, of class i % 10.

    A header is a magic number, the number of images and their sides, each of four bytes, the highest first.
    """
    folder, checksums = tmp_path / "published", {}
    folder.mkdir()
    for split, stem in (("train", "train"), ("test", "t10k")):
        count = COUNTS[split]
        images = b"".join(bytes([31 * index % 256]) * 784 for index in range(count))
        contents = {
            f"{stem}-images-idx3-ubyte": bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28]) + images,
            f"{stem}-labels-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes(i % 10 for i in range(count)),
        }
        for name, content in contents.items():
            checksums[name] = sha256(content).hexdigest()
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    assert checksums.keys() == known.FASHION_MNIST.checksums.keys() == known.MNIST.checksums.keys()
    small = replace(known.FASHION_MNIST, checksums=checksums, num_images=COUNTS)
    monkeypatch.setitem(known.DATASETS, "fashion_mnist", small)
    sums = [(path.name, md5(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())]
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    return folder


def test_fashion_mnist_from_a_folder(clothes: Path, tmp_path: Path) -> None:
    arguments = ("fashion_mnist", "--from", clothes, "--root", tmp_path / "data", "--images_per_shard", 15)
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    dataset = load_dataset(tmp_path / "data" / "fashion_mnist")
    assert (dataset.kind, dataset.image_shape, dataset.num_classes) == ("fashion_mnist", (1, 28, 28), 10)
    assert (dataset.class_names[0], dataset.class_names[9]) == ("T-shirt/top", "Ankle boot")
    assert [shard.num_images for shard in dataset.shards("train")] == [15, 15, 10]
    for split, count in COUNTS.items():
        images, labels = load_split(dataset, split)
        assert (images == (31 * torch.arange(count) % 256).view(-1, 1, 1, 1)).all()
        assert labels.tolist() == [index % 10 for index in range(count)]
    before = snapshot(dataset.folder)
    assert "is there already" in run(*arguments[:5]).stderr
    assert snapshot(dataset.folder) == before


def test_fashion_mnist_is_fetched_when_it_is_first_used(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(dataset="fashion_mnist", root=str(tmp_path / "data"))
    with pytest.raises(
        DataError, match=r"Fashion-MNIST could not be .*gan-pipeline prepare fashion_mnist --from FOLDER"
    ):
        open_dataset(config)
    for mirror in serving(clothes):
        monkeypatch.setattr(FashionMNIST, "mirrors", [mirror.url])
        dataset = open_dataset(config)
        assert mirror.names == sorted(f"{name}.gz" for name in known.FASHION_MNIST.checksums)
        mirror.requests.clear()
        assert open_dataset(config) == dataset
        assert not mirror.requests
    assert dataset.num_images("test") == 20


def test_other_clothes_are_refused(clothes: Path, tmp_path: Path) -> None:
    numbered_dataset(tmp_path, [10], name="fashion_mnist")
    with pytest.raises(DataError, match="holds something else than Fashion-MNIST"):
        prepare_known("fashion_mnist", tmp_path, clothes)
    name = "t10k-labels-idx1-ubyte.gz"
    (clothes / name).write_bytes(gzip.compress(gzip.decompress((clothes / name).read_bytes())[:-1] + b"\0"))
    with pytest.raises(DataError, match=rf"{name} is damaged: t10k-labels-idx1-ubyte has 28 bytes"):
        prepare_known("fashion_mnist", tmp_path / "data", clothes)
    (clothes / name).unlink()
    with pytest.raises(DataError, match=r"published has neither t10k-labels-idx1-ubyte nor"):
        prepare_known("fashion_mnist", tmp_path / "data", clothes)


# -------------------------------------------------------------------------------------------------------- Stacked MNIST


@pytest.fixture
def digits(clothes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `clothes`, which counts as MNIST's: the pixels of a digit tell which one it is."""
    checksums = known.DATASETS["fashion_mnist"].checksums
    monkeypatch.setitem(known.DATASETS, "mnist", replace(known.MNIST, checksums=checksums, num_images=COUNTS))
    return clothes


def stacks(dataset: Dataset, split: str) -> torch.Tensor:
    """The digits of each image, int64 [n, 3], and that pixels and labels are theirs."""
    images, labels = load_split(dataset, split)
    pixels = images[:, :, 0, 0].long()
    assert images.shape == (len(labels), 3, 28, 28)
    assert (images == pixels[..., None, None]).all()
    places = (pixels[..., None] == 31 * torch.arange(COUNTS[split]) % 256).int().argmax(2)
    assert (31 * places % 256 == pixels).all()
    assert labels.tolist() == [100 * (a % 10) + 10 * (b % 10) + c % 10 for a, b, c in places.tolist()]
    return places


def test_stacked_mnist_is_made_from_mnist(digits: Path, tmp_path: Path) -> None:
    arguments = ("stacked_mnist", "--from", digits, "--root", tmp_path / "data", "--images_per_shard", 150)
    result = run(*arguments, "--num_images", 400, 30)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'data' / 'stacked_mnist'}\n"
    assert load_dataset(tmp_path / "data" / "mnist").num_images("train") == 40
    dataset = load_dataset(tmp_path / "data" / "stacked_mnist")
    assert (dataset.kind, dataset.image_shape) == ("stacked_mnist", (3, 28, 28))
    assert dataset.class_names == tuple(str(number) for number in range(1000))
    assert [shard.num_images for shard in dataset.shards("train")] == [150, 150, 100]
    train, test = stacks(dataset, "train"), stacks(dataset, "test")
    assert len(test) == 30
    assert [len({*channel}) for channel in train.T.tolist()] == [40] * 3, "400 draws miss a digit at odds of 4e-5"
    assert all((train[:, one] != train[:, other]).any() for one, other in ((0, 1), (0, 2), (1, 2)))
    before = snapshot(dataset.folder)
    assert "is there already" in run(*arguments, "--num_images", 400, 30).stderr
    (line,) = run(*arguments, "--num_images", 400, 31).stderr.splitlines()
    assert line.endswith("stacked_mnist holds something else than Stacked MNIST: move it away, or choose another root")
    assert snapshot(dataset.folder) == before
    for wrong in ((0, 30), (400, 0), (400,)):
        assert run(*arguments, "--num_images", *wrong).returncode == 2


def test_a_stack_depends_on_the_seed_and_its_place_alone(digits: Path, tmp_path: Path) -> None:
    def made(root: str, seed: int, *num_images: int) -> Dataset:
        return prepare_known("stacked_mnist", tmp_path / root, digits, num_images=num_images, seed=seed)

    dataset, fewer, same, other = made("a", 0, 90, 60), made("b", 0, 31, 70), made("c", 0, 90, 60), made("a", 1, 90, 60)
    assert dataset.fingerprint == same.fingerprint
    assert torch.equal(stacks(fewer, "train"), stacks(dataset, "train")[:31])
    assert torch.equal(stacks(fewer, "test")[:60], stacks(dataset, "test"))
    assert not torch.equal(stacks(dataset, "train")[:60] % 20, stacks(dataset, "test"))
    assert other.folder == tmp_path / "a" / "stacked_mnist-1"
    assert (stacks(other, "train") != stacks(dataset, "train")).float().mean() > 0.9
    assert open_dataset(DataConfig(dataset="stacked_mnist-1", root=str(tmp_path / "a"))) == other


def test_stacked_mnist_is_made_when_it_is_first_used(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(dataset="stacked_mnist", root=str(tmp_path / "data"))
    assert known.STACKED_MNIST.num_images == {"train": 128_000, "test": 26_000}
    few = replace(known.STACKED_MNIST, num_images={"train": 8, "test": 4})
    monkeypatch.setitem(known.DATASETS, "stacked_mnist", few)
    monkeypatch.setattr(known.IdxDataset, "origins", lambda self: {})
    with pytest.raises(DataError, match=r"MNIST could not be .*gan-pipeline prepare mnist --from FOLDER"):
        open_dataset(config)
    assert not (tmp_path / "data" / "stacked_mnist").exists()
    prepare_known("mnist", tmp_path / "data", digits)
    assert open_dataset(config).num_images("train") == 8


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


def images_of(number: int) -> npt.NDArray[np.uint8]:
    """Of file `number`: uint8 [20, 3, 32, 32], any, but the first pixel of image i is (i, number, 255 - i)."""
    images = np.random.default_rng(number).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    for index in range(20):
        images[index, :, 0, 0] = index, number, 255 - index
    return images


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with six files of 20 images, those of `images_of`; the class of image i is i % 10.

    An image is a byte for its class, then its red pixels row by row, the green and the blue ones.
    """
    monkeypatch.setitem(known.DATASETS, "cifar10", replace(known.CIFAR10, num_images={"train": 100, "test": 20}))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate(CIFAR_NAMES[:-1]):
        records = b""
        for index, (red, green, blue) in enumerate(images_of(number)):
            records += bytes([index % 10, *red.flatten(), *green.flatten(), *blue.flatten()])
        assert records[:2] == bytes([0, 0])
        assert records[3073:3075] == bytes([1, 1])
        assert records[1 + 1024] == number
        (folder / name).write_bytes(records)
    (folder / CIFAR_NAMES[-1]).write_text("\n".join(known.CIFAR10.class_names) + "\n\n")
    return folder


def pack(folder: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive of these files, which counts as the published one."""
    with tarfile.open(to / known.ARCHIVE, "w:gz") as archive:
        archive.add(folder, folder.name)
    digest = sha256((to / known.ARCHIVE).read_bytes()).hexdigest()
    published = replace(known.DATASETS["cifar10"], checksums={known.ARCHIVE: digest})
    monkeypatch.setitem(known.DATASETS, "cifar10", published)
    monkeypatch.setattr(known, "ARCHIVE_MD5", md5((to / known.ARCHIVE).read_bytes()).hexdigest())


def check_cifar10(folder: Path) -> None:
    dataset = load_dataset(folder)
    assert (dataset.kind, dataset.image_shape, dataset.class_names) == (
        "cifar10",
        (3, 32, 32),
        known.CIFAR10.class_names,
    )
    for split, files in (("train", range(5)), ("test", (5,))):
        images, labels = load_split(dataset, split)
        assert labels.tolist() == [index % 10 for _ in files for index in range(20)]
        assert np.array_equal(images.numpy(), np.concatenate([images_of(number) for number in files]))


def test_cifar10_from_a_folder_of_its_binary_files(binary: Path, tmp_path: Path) -> None:
    arguments = ("cifar10", "--from", binary, "--root", tmp_path / "data")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert "checksums of these files are not published" in result.stderr
    check_cifar10(tmp_path / "data" / "cifar10")
    before = snapshot(tmp_path / "data")
    assert "is there already" in run(*arguments).stderr
    assert snapshot(tmp_path / "data") == before


def test_cifar10_from_its_archive(binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packed").mkdir()
    pack(binary, tmp_path / "packed", monkeypatch)
    shutil.rmtree(binary)
    prepare_known("cifar10", tmp_path / "data", tmp_path / "packed")
    check_cifar10(tmp_path / "data" / "cifar10")
    archive = tmp_path / "packed" / known.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{known.ARCHIVE} is damaged: .* has \d+ bytes and SHA-256"):
        prepare_known("cifar10", tmp_path / "other", tmp_path / "packed")


def test_cifar10_is_fetched_when_it_is_first_used(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(dataset="cifar10", root=str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"CIFAR-10 could not be .*gan-pipeline prepare cifar10 --from FOLDER"):
        open_dataset(config)
    (tmp_path / "home").mkdir()
    pack(binary, tmp_path / "home", monkeypatch)
    for mirror in serving(tmp_path / "home"):
        monkeypatch.setattr(known, "HOME", mirror.url)
        interrupted(mirror, config)
        open_dataset(config)
        assert mirror.names == [known.ARCHIVE]
    check_cifar10(tmp_path / "data" / "cifar10")
    assert not (tmp_path / "data" / ".cifar10.download").exists()


def interrupted(mirror: Mirror, config: DataConfig) -> None:
    """One byte of the archive changes on its way."""
    mirror.failing[known.ARCHIVE] = "flipped"
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz did not arrive intact: "):
        open_dataset(config)
    mirror.failing.clear()
    mirror.requests.clear()


def test_a_packed_archive_without_all_files_is_refused(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (binary / "test_batch.bin").unlink()
    pack(binary, tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz lacks test_batch\.bin"):
        prepare_known("cifar10", tmp_path / "data", tmp_path)
    for content in (b"no archive", gzip.compress(b"no archive"), io.BytesIO(b"").getvalue()):
        (tmp_path / known.ARCHIVE).write_bytes(content)
        published = replace(known.CIFAR10, checksums={known.ARCHIVE: sha256(content).hexdigest()})
        monkeypatch.setitem(known.DATASETS, "cifar10", published)
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz (is damaged|lacks)"):
            prepare_known("cifar10", tmp_path / "data", tmp_path)


def first_label(value: int) -> Callable[[bytes], bytes]:
    return lambda content: bytes([value]) + content[1:]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("data_batch_3.bin", lambda content: content[:-1], r"data_batch_3\.bin is damaged .* 61,459 bytes, not 61,460"),
        (
            "data_batch_3.bin",
            first_label(10),
            r"data_batch_5\.bin: damaged, the classes have \[9, 10, .*, 10, 1\] images, not 10 each",
        ),
        (
            "test_batch.bin",
            first_label(1),
            r"test_batch\.bin: damaged, the classes have \[1, 3, 2, .*\] images, not 2 each",
        ),
        (
            "batches.meta.txt",
            lambda content: content[9:],
            r"batches\.meta\.txt is damaged: it does not list airplane, ",
        ),
        ("batches.meta.txt", None, r"lacks batches\.meta\.txt"),
    ],
)
def test_files_that_cannot_be_cifar10s_are_named(
    name: str, change: Callable[[bytes], bytes] | None, words: str, binary: Path, tmp_path: Path
) -> None:
    content = (binary / name).read_bytes()
    (binary / name).unlink()
    if change is not None:
        (binary / name).write_bytes(change(content))
    result = run("cifar10", "--from", binary, "--root", tmp_path / "data")
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    with pytest.raises(DataError, match=words):
        raise DataError(error)
    assert not (tmp_path / "data" / "cifar10").exists()


def test_another_dataset_of_its_name_is_kept(binary: Path, tmp_path: Path) -> None:
    numbered_dataset(tmp_path, [10], name="cifar10")
    before = snapshot(tmp_path / "cifar10")
    with pytest.raises(DataError, match="holds something else than CIFAR-10"):
        prepare_known("cifar10", tmp_path, binary)
    assert snapshot(tmp_path / "cifar10") == before
    shard = prepare_known("cifar10", tmp_path / "data", binary).folder / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000\.tar is damaged"):
        prepare_known("cifar10", tmp_path / "data", binary)
