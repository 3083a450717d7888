"""CIFAR-10 (Krizhevsky 2009) from its binary version, of which nothing is unpickled: fetched, verified, written."""

from __future__ import annotations

import io
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.data.images import ImageShape, Split
from pipeline.data.manifest import DataError, Dataset
from pipeline.data.prepare.commit import (
    DEFAULT_SIZES,
    ShardSizes,
    commit,
    keep_existing,
    preparing,
    say,
    verify,
    write_shards,
)
from pipeline.data.prepare.downloads import download, fetch, verified

HOME = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE = "cifar-10-binary.tar.gz"
CHECKSUMS = {ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
"""SHA-256 of the archive of 170,052,171 bytes, whose MD5 the dataset's page gives as c32a1d4ab5d03f1284b67883e8d87530.
Of the files in it none is published."""
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES_FILE = "batches.meta.txt"
FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
IMAGES_PER_FILE = 10_000
SHAPE: ImageShape = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
"""The label, then the red, the green and the blue pixels, each row by row."""


def prepare_cifar10(root: Path, source: Path | None = None, sizes: ShardSizes = DEFAULT_SIZES) -> Dataset:
    """CIFAR-10 as `root`/cifar10, its images in the order of the original files.

    They come from the folder `source`, which holds the archive, checked by SHA-256, or the files out of it, of which
    only the structure can be checked; without it from the dataset's page. Raises DataError when neither has them, and
    when what is there already is damaged or another dataset.
    """
    folder, downloads = root / "cifar10", root / ".cifar10.download"
    with preparing(root, "cifar10") as temporary:
        if folder.exists():
            return keep_existing(
                folder, _is_cifar10, "something else than CIFAR-10: move it away, or choose another root"
            )
        files = _read_folder(source) if source else _fetch(downloads)
        splits = {split: _parse({name: files[name] for name in names}) for split, names in FILES.items()}
        if tuple(files[CLASSES_FILE].decode("ascii", "replace").split()) != CLASS_NAMES:
            raise DataError(f"{CLASSES_FILE} is damaged: it does not list {', '.join(CLASS_NAMES)}")
        shards = write_shards(temporary, splits, sizes, shuffle=False)
        dataset = commit(Dataset(folder, "cifar10", SHAPE, CLASS_NAMES, shards, kind="cifar10"), temporary)
        shutil.rmtree(downloads, ignore_errors=True)
        return dataset


def _is_cifar10(dataset: Dataset) -> bool:
    numbers = {split: dataset.num_images(split) for split in dataset.splits}
    expected = {split: len(names) * IMAGES_PER_FILE for split, names in FILES.items()}
    known = (dataset.kind, dataset.image_shape, dataset.class_names, numbers)
    if same := known == ("cifar10", SHAPE, CLASS_NAMES, expected):
        verify(dataset)
    return same


def _parse(files: dict[str, bytes]) -> Split:
    """Raises DataError for files that CIFAR-10's can't be: of another size, or with classes of unequal numbers."""
    for name, content in files.items():
        if len(content) != IMAGES_PER_FILE * RECORD_BYTES:
            raise DataError(
                f"{name} is damaged or not of CIFAR-10's binary version: it has {len(content):,} bytes, "
                f"not {IMAGES_PER_FILE * RECORD_BYTES:,}"
            )
    records = np.frombuffer(b"".join(files.values()), np.uint8).reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    if len(counts) > len(CLASS_NAMES) or counts.min() != counts.max():
        raise DataError(
            f"{', '.join(files)}: damaged, {counts.min():,} to {counts.max():,} images of each class from 0 to "
            f"{len(counts) - 1}, not {len(labels) // len(CLASS_NAMES):,} of each of {len(CLASS_NAMES)}"
        )
    return Split(len(labels), labels, records[:, 1:].reshape(-1, *SHAPE).__getitem__)


def _read_folder(folder: Path) -> dict[str, bytes]:
    if (archive := folder / ARCHIVE).exists():
        return _unpacked(verified(ARCHIVE, archive.read_bytes(), CHECKSUMS[ARCHIVE], str(archive)))
    files = {}
    for name in _names():
        if not (folder / name).exists():
            raise DataError(f"{folder} has neither {ARCHIVE} nor {name}")
        files[name] = (folder / name).read_bytes()
    say(f"{folder}: sizes and classes are checked, checksums of these files are not published (of {ARCHIVE} one is)")
    return files


def _fetch(downloads: Path) -> dict[str, bytes]:
    try:
        return _unpacked(fetch("CIFAR-10", CHECKSUMS, {HOME: _from_home}, downloads)[ARCHIVE])
    except DataError as error:
        raise DataError(
            f"{error}. Put {ARCHIVE}, or the files out of it, into a folder and run: "
            "python pipeline/prepare.py cifar10 --from FOLDER"
        ) from None


def _from_home(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        yield name, download(HOME + name)


def _unpacked(archive: bytes) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
            for member in members:
                name = member.name.rpartition("/")[2]
                file = members.extractfile(member) if name in _names() else None
                if file is not None:
                    files[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{ARCHIVE} is damaged: {error}") from None
    if missing := [name for name in _names() if name not in files]:
        raise DataError(f"{ARCHIVE} lacks {', '.join(missing)}")
    return files


def _names() -> list[str]:
    return [*(name for names in FILES.values() for name in names), CLASSES_FILE]
