"""How a dataset comes into being: cut into shards, then committed as a whole.

It appears under its name only when it is complete and on disk: it is written into a temporary folder beside it, fsynced
and renamed, under a lock that lets one process work while the others wait. What is there already is never overwritten.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pipeline.data.images import Images, Labels, Split
from pipeline.data.manifest import FILE_NAME, KINDS, DataError, Dataset, Shard, load_dataset, to_json
from pipeline.data.remarks import Remarks
from pipeline.data.shards import read_shard, write_shard
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
    """A shard is what a lane keeps in memory and what is read twice where two lanes meet: 2 MB for MNIST (whose 24
    shards the default 8 lanes share evenly), 490 MB at 256 x 256 RGB."""


DEFAULT_SIZES = ShardSizes()


def check_name(name: str) -> None:
    """Raises UserError for the name of a dataset of one's own that is no file name, or where a known dataset belongs.

    Some file systems take `MNIST` for `mnist`, and a dataset may be moved to one of them.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"the name {name!r} must consist of letters, digits, '.', '_' and '-'")
    if (known := name.casefold()) in KINDS and known != "own":
        raise UserError(
            f"the name {name!r} belongs to the known dataset {known}, in whose place these images would be trained on "
            "and scored: choose another (images that are of that kind are given --kind)"
        )


@contextmanager
def preparing(root: Path, name: str) -> Iterator[Path]:
    """A temporary folder for what will be `root`/`name`, under the lock of that name.

    A killed process leaves a folder, which the next one clears. Raises UserError in place of any OSError inside.
    """
    temporary = root / f".{name}.tmp"
    try:
        lock = Lock(
            root / f".{name}.preparing",
            on_wait=lambda: say(f"another process is preparing {root / name}: waiting for it"),
        )
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.release()
    except LockHeld as holder:
        raise UserError(f"{root / name} is being prepared by {holder}") from None
    except OSError as error:  # it names its file
        raise UserError(str(error)) from None


def write_shards(
    folder: Path, splits: dict[str, Split], sizes: ShardSizes, *, shuffle: bool
) -> dict[str, tuple[Shard, ...]]:
    """The shards of each split, its images in their order or, always in the same way, shuffled."""
    written = {}
    for name, split in splits.items():
        order = np.arange(split.num_images)
        if shuffle:
            order = torch.randperm(split.num_images, generator=seeded(0, "prepare", split.num_images)).numpy()
        with bar(total=split.num_images, desc=f"writing {name}", unit="image") as progress:
            written[name] = tuple(
                write_shard(
                    folder / f"{name}-{start // sizes.images_per_shard:05d}.tar",
                    _blocks(split, order[start : start + sizes.images_per_shard], sizes.images_per_block, progress),
                )
                for start in range(0, split.num_images, sizes.images_per_shard)
            )
    return written


def _blocks(
    split: Split, rows: npt.NDArray[np.int64], size: int, progress: tqdm[None]
) -> Iterator[tuple[Images, Labels | None]]:
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield split.read(block), None if split.labels is None else split.labels[block]
        progress.update(len(block))


def commit(dataset: Dataset, temporary: Path, remarks: Remarks | None = None) -> Dataset:
    """Gives a dataset, whose shards lie in the folder of `preparing`, its name, and says what it holds.

    Raises DataError when another dataset has the name; the same one is verified and left as it is.
    """
    folder = dataset.folder

    def is_same(existing: Dataset) -> bool:
        if same := (existing.fingerprint, existing.kind) == (dataset.fingerprint, dataset.kind):
            verify(existing)
        return same

    if folder.exists():
        return keep_existing(folder, is_same, "another dataset: move it away, or choose another name or root")
    (temporary / FILE_NAME).write_text(json.dumps(to_json(dataset), indent=1) + "\n")
    for path in temporary.iterdir():
        fsync(path)
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)
    counts = ", ".join(f"{dataset.num_images(split):,} {split}" for split in dataset.splits)
    classes = f" in {dataset.num_classes:,} classes" if dataset.num_classes else ""
    ending = f"; {remarks}" if remarks else ""
    say(f"{folder}: {counts} images of {' x '.join(map(str, dataset.image_shape))}{classes}{ending}")
    return dataset


def verify(dataset: Dataset) -> None:
    """Raises DataError naming the first shard that is not what the manifest says."""
    for shard in (shard for shards in dataset.splits.values() for shard in shards):
        read_shard(dataset, shard)


def keep_existing(folder: Path, is_same: Callable[[Dataset], bool], otherwise: str) -> Dataset:
    """The dataset that has the name already, which `is_same` verifies. Raises DataError when it is something else."""
    if not (folder / FILE_NAME).exists():
        raise DataError(f"{folder} exists and is not a dataset: move it away, or choose another root")
    # Only its content is compared, so a pipe: that the user allowed once is not asked about again.
    existing = load_dataset(folder, allow_shell_urls=True)
    if not is_same(existing):
        raise DataError(f"{folder} holds {otherwise}")
    say(f"{folder} is there already, complete and verified: left as it is")
    return existing


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
