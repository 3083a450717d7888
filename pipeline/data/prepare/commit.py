"""How a dataset comes into being: cut into shards, then committed as a whole.

It appears under its name only when it is complete and on disk: it is written into a temporary folder beside it, fsynced
and renamed, under a lock that lets one process work while the others wait. An existing dataset is never overwritten.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pipeline.data.dataset import FILE_NAME, KNOWN, DataError, Dataset, Remarks, Shard, load_dataset, to_json
from pipeline.data.images import Split
from pipeline.data.shards import Images, Labels, read_shard, write_shard
from pipeline.distributed.progress import bar
from pipeline.errors import UserError
from pipeline.rng import seeded
from pipeline.storage.files import fsync
from pipeline.storage.lock import Lock, LockHeld


class ShardSizes(NamedTuple):
    """How many images a member and a shard hold."""

    images_per_block: int = 250
    """Throughput hardly grows beyond 100 images a member."""
    images_per_shard: int = 2500
    """A lane holds a shard in memory, and a shard where two lanes meet is read twice: 2 MB for MNIST (the default 8
    lanes share its 24 shards evenly), 490 MB at 256 x 256 RGB."""


DEFAULT_SIZES = ShardSizes()


def check_name(name: str) -> None:
    """Raises UserError for a user's dataset whose name is no file name, or belongs to a known dataset.

    Some file systems take `MNIST` for `mnist`, and a dataset may be moved to one of them.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"the name {name!r} must consist of letters, digits, '.', '_' and '-'")
    if (known := name.casefold()) in KNOWN:
        raise UserError(
            f"the name {name!r} belongs to the known dataset {known}, in whose place these images would be trained on "
            "and scored: choose another (images that are of that kind are given --kind)"
        )


def write_dataset(dataset: Dataset, splits: dict[str, Split], sizes: ShardSizes, remarks: Remarks) -> Dataset:
    """Writes and commits `splits`, shuffled, as what `dataset` describes but for its shards. Returns it with them."""
    with preparing(dataset.folder) as temporary:
        shards = write_shards(temporary, splits, sizes, shuffle=True)
        return commit(replace(dataset, splits=shards), temporary, remarks)


@contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder for what will be the dataset's `folder`, under the lock of that name.

    A killed process leaves a folder, which the next one clears. Raises UserError in place of any OSError inside.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        message = f"another process is preparing {folder}: waiting for it"
        lock = Lock(folder.with_name(f".{folder.name}.preparing"), on_wait=lambda: print_line(message))
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # a killed process left it
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.release()
    except LockHeld as holder:
        raise UserError(f"{folder} is being prepared by {holder}") from None
    except OSError as error:  # it names its file
        raise UserError(str(error)) from None


def write_shards(
    folder: Path, splits: dict[str, Split], sizes: ShardSizes, *, shuffle: bool
) -> dict[str, tuple[Shard, ...]]:
    """Writes the shards of each split, its images in their order or, always in the same way, shuffled."""
    shards = {}
    for name, split in splits.items():
        order = np.arange(split.num_images)
        if shuffle:
            order = torch.randperm(split.num_images, generator=seeded(0, "prepare", split.num_images)).numpy()
        with bar(total=split.num_images, desc=f"writing {name}", unit="image") as progress:
            shards[name] = tuple(
                write_shard(
                    folder / f"{name}-{start // sizes.images_per_shard:05d}.tar",
                    _blocks(split, order[start : start + sizes.images_per_shard], sizes.images_per_block, progress),
                )
                for start in range(0, split.num_images, sizes.images_per_shard)
            )
    return shards


def _blocks(
    split: Split, rows: npt.NDArray[np.int64], size: int, progress: tqdm[None]
) -> Iterator[tuple[Images, Labels | None]]:
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield split.read(block), None if split.labels is None else split.labels[block]
        progress.update(len(block))


def commit(dataset: Dataset, temporary: Path, remarks: Remarks) -> Dataset:
    """Gives a dataset, whose shards lie in the folder of `preparing`, its name, and prints a summary of it.

    Raises DataError when another dataset has the name; the same one is verified and left as it is.
    """
    folder = dataset.folder
    if folder.exists():
        same = (dataset.fingerprint, dataset.kind)
        otherwise = "another dataset: move it away, or choose another name or root"
        return keep_existing(folder, lambda existing: (existing.fingerprint, existing.kind) == same, otherwise)
    (temporary / FILE_NAME).write_text(json.dumps(to_json(dataset), indent=1) + "\n")
    # A folder of this name counts as a complete dataset. After a power cut it must not be there without its content, so
    # first the bytes of all files, then their names in the folder, and only then its new name are flushed to the disk.
    for path in temporary.iterdir():
        fsync(path)
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)
    counts = ", ".join(f"{dataset.num_images(split):,} {split}" for split in dataset.splits)
    classes = f" in {dataset.num_classes:,} classes" if dataset.num_classes else ""
    ending = f"; {remarks}" if remarks else ""
    print_line(f"{folder}: {counts} images of {' x '.join(map(str, dataset.image_shape))}{classes}{ending}")
    return dataset


def keep_existing(folder: Path, is_same: Callable[[Dataset], bool], otherwise: str) -> Dataset:
    """Returns the dataset that has the name already, once all its shards are verified.

    Raises DataError when a shard is not what the manifest says, and that the folder holds `otherwise` unless `is_same`.
    """
    if not (folder / FILE_NAME).exists():
        raise DataError(f"{folder} exists and is not a dataset: move it away, or choose another root")
    # Only its content is compared, so a pipe: URL that the user allowed once need not be allowed again.
    existing = load_dataset(folder, allow_shell_urls=True)
    if not is_same(existing):
        raise DataError(f"{folder} holds {otherwise}")
    for shard in (shard for shards in existing.splits.values() for shard in shards):
        read_shard(existing, shard)
    print_line(f"{folder} is there already, complete and verified: left as it is")
    return existing


def print_line(message: str) -> None:
    """Prints a line to standard error, above a progress bar."""
    tqdm.write(message, file=sys.stderr)
