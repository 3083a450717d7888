"""How a dataset comes into being: its images are read once, cut into shards, then committed as a whole.

A source is an iterator of `Row`s, and `write_rows` does the rest. A dataset appears under its name only when it is
complete and on disk: it is written into a temporary folder beside it, fsynced and renamed, under a lock that lets one
process work while the others wait. An existing dataset is never overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pipeline.data.class_names import classes_of_labels
from pipeline.data.dataset import (
    FILE_NAME,
    KNOWN,
    SPLITS,
    DataError,
    Dataset,
    ImageShape,
    Remarks,
    Shard,
    counted,
    load_dataset,
    to_json,
)
from pipeline.data.images import CommonShape, Resizing, Row, Split, decode_row
from pipeline.data.shards import Images, Labels, numbered, read_shard, write_shard
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


class Rows(NamedTuple):
    """A split as its source gives it: it is read once, from the first image to the last."""

    rows: Iterable[Row]
    source: str
    """What messages call all of them."""
    total: int | None = None
    """Number of images, for the progress bar, where that is known."""


def write_rows(
    folder: Path,
    splits: Mapping[str, Rows],
    sizes: ShardSizes,
    resizing: Resizing,
    kind: str,
    remarks: Remarks,
    class_names: Sequence[str] | None = None,
    *,
    shuffle: bool = True,
) -> Dataset:
    """Writes and commits the images of a source as the dataset `folder`. Its memory does not grow with their number.

    They are decoded once and wait on disk, unpacked, for the last of them, which may be the only one with colours; then
    they are written in their order or, by default, shuffled, always in the same way. Images become grey if all are,
    otherwise RGB.

    Args:
        splits: The images of "train" and maybe "test".
        kind: What they are, one of KINDS: feature spaces go by it.
        class_names: The names of the classes whose numbers or names the labels are. By default the labels tell, see
            `classes_of_labels`.

    Raises:
        DataError: an image does not decode, is too small to be cropped, has another size than those before it, or its
            label does not fit to theirs; it names the image.
        UserError: a file cannot be written.
    """
    with preparing(folder) as temporary, ExitStack() as files:
        common, unpacked = CommonShape(remarks, resizing), dict[str, _Unpacked]()
        for split, (rows, _, total) in splits.items():
            images = unpacked[split] = _Unpacked(files.enter_context(TemporaryFile(dir=temporary)))
            for row in bar(iterable=rows, total=total, desc=f"reading {split}", unit="image"):
                images.add(row, decode_row(row, common.add(row), resizing))
        shape = common.of_all()
        if class_names is None:
            labels = [(split, splits[split].source, set(images.labels)) for split, images in unpacked.items()]
            class_names = classes_of_labels(labels)
        written = {split: images.split(shape, class_names) for split, images in unpacked.items()}
        if (numbers := written["train"].labels) is not None:
            for label in sorted({*range(len(class_names))} - {*numbers.tolist()}):
                remarks.add("without a training image", "class", repr(class_names[label]))
        shards = write_shards(temporary, written, sizes, shuffle=shuffle)
        dataset = Dataset(folder, folder.name, shape, tuple(class_names), shards, kind=kind)
        return commit(dataset, temporary, remarks)


class _Unpacked:
    """The decoded images of a split, in a file, and their labels."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._starts = file, array("q", [0])
        self.labels: list[int | str | None] = []
        self._equal: dict[int | str | None, int | str | None] = {}

    def add(self, row: Row, image: Images) -> None:
        """Appends an image uint8 [C, H, W]."""
        if self.labels and type(row.label) is not type(self.labels[-1]):
            raise DataError(
                f"the label of {row.name} is {row.label!r}, that of the image before it {self.labels[-1]!r}"
            )
        self.labels.append(self._equal.setdefault(row.label, row.label))  # one object for all images of a class
        self._file.write(image.tobytes())
        self._starts.append(self._file.tell())

    def split(self, image_shape: ImageShape, class_names: Sequence[str]) -> Split:
        """Returns the images as they are written, and their labels as numbers of these classes."""
        self._file.flush()
        labels = [label for label in self.labels if label is not None]

        def read(indices: npt.NDArray[np.int64]) -> Images:
            images = np.empty((len(indices), *image_shape), np.uint8)
            for row, index in enumerate(indices):
                start, stop = self._starts[index : index + 2]
                content = os.pread(self._file.fileno(), stop - start, start)
                images[row] = np.frombuffer(content, np.uint8).reshape(-1, *image_shape[1:])  # grey fills all of RGB
            return images

        return Split(len(self.labels), numbered(labels, class_names) if labels else None, read)


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
        count = split.num_images
        order = torch.randperm(count, generator=seeded(0, "prepare", count)) if shuffle else torch.arange(count)
        with bar(total=count, desc=f"writing {name}", unit="image") as progress:
            shards[name] = tuple(
                write_shard(folder / f"{name}-{number:05d}.tar", _blocks(split, rows, sizes.images_per_block, progress))
                for number, rows in enumerate(torch.split(order, sizes.images_per_shard))
            )
    return shards


def _blocks(
    split: Split, rows: torch.Tensor, size: int, progress: tqdm[None]
) -> Iterator[tuple[Images, Labels | None]]:
    for block in map(torch.Tensor.numpy, torch.split(rows, size)):
        yield split.read(block), None if split.labels is None else split.labels[block]
        progress.update(len(block))


def commit(dataset: Dataset, temporary: Path, remarks: Remarks) -> Dataset:
    """Gives a dataset, whose shards lie in the folder of `preparing`, its name, and prints a summary of it.

    Raises DataError when another dataset has the name; the same one is verified and left as it is.
    """
    folder = dataset.folder
    if folder.exists():
        return keep_existing(folder, lambda existing: _other_content(existing, dataset))
    (temporary / FILE_NAME).write_text(json.dumps(to_json(dataset), indent=1) + "\n")
    # A folder of this name counts as a complete dataset. After a power cut it must not be there without its content, so
    # first the bytes of all files, then their names in the folder, and only then its new name are flushed to the disk.
    for path in temporary.iterdir():
        fsync(path)
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)
    *others, last = dataset.splits
    counts = [f"{dataset.num_images(split):,} {split}" for split in others]
    images = ", ".join([*counts, counted(dataset.num_images(last), f"{last} image")])
    classes = f"in {dataset.num_classes:,} classes" if dataset.num_classes > 1 else "without classes"
    ending = f"; {remarks}" if remarks else ""
    shown = dataset.name if folder.parent.name.startswith(".") else folder  # a hidden folder is a program's own
    print_line(f"{shown}: {images} of {' x '.join(map(str, dataset.image_shape))} {classes}{ending}")
    return dataset


def _other_content(existing: Dataset, dataset: Dataset) -> str:
    """Returns how a dataset that has the name already differs from the one to commit; empty if it does not."""
    if (existing.fingerprint, existing.kind) == (dataset.fingerprint, dataset.kind):
        return ""
    there, here = (
        (
            "x".join(map(str, each.image_shape)),
            *(counted(each.num_images(split) if split in each.splits else 0, f"{split} image") for split in SPLITS),
            counted(each.num_classes, "class"),
            f"kind {each.kind}",
        )
        for each in (existing, dataset)
    )
    differing = [f"{old} there, {new} here" for old, new in zip(there, here, strict=True) if old != new]
    return (
        f"another dataset ({'; '.join(differing) or 'other images, labels or names'}): move it away, or choose "
        "another name or root"
    )


def keep_existing(folder: Path, other_content: Callable[[Dataset], str]) -> Dataset:
    """Returns the dataset that has the name already, once all its shards are verified.

    Raises DataError when a shard is not what the manifest says, and that the folder holds its `other_content` if that
    is not empty.
    """
    if not (folder / FILE_NAME).exists():
        raise DataError(f"{folder} exists and is not a dataset: move it away, or choose another root")
    # Only its content is compared, so a pipe: URL that the user allowed once need not be allowed again.
    existing = load_dataset(folder, allow_shell_urls=True)
    if other := other_content(existing):
        raise DataError(f"{folder} holds {other}")
    for shard in (shard for shards in existing.splits.values() for shard in shards):
        read_shard(existing, shard)
    print_line(f"{folder} is there already, complete and verified: left as it is")
    return existing


def print_line(message: str) -> None:
    """Prints a line to standard error, above a progress bar."""
    tqdm.write(message, file=sys.stderr)
