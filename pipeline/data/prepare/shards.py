"""Existing WebDataset shards as datasets: an index of where they are, or, resized, shards of their images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from pipeline.data.dataset import (
    DEFAULT_READING,
    DataError,
    Dataset,
    ImageShape,
    Reading,
    Remarks,
    Shard,
    check_allowed,
    read_bytes,
    scheme,
)
from pipeline.data.images import AS_STORED, Resizing, common_shape, file_shape
from pipeline.data.prepare.commit import (
    DEFAULT_SIZES,
    Row,
    Rows,
    ShardSizes,
    check_name,
    classes_of_labels,
    commit,
    preparing,
    print_line,
    write_rows,
)
from pipeline.data.shards import Samples, parse_shard
from pipeline.distributed.progress import bar

ANY_IMAGE = Reading(image_key="")
"""Takes whichever image a sample has, and refuses several."""

Indexed = tuple[str, Shard, Samples]
"""The split of a shard that was read once, the shard under its path or URL, and its samples without the images."""


def index_shards(
    root: Path,
    name: str,
    patterns: dict[str, Sequence[str]],
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    resizing: Resizing = AS_STORED,
    kind: str = "own",
    reading: Reading = ANY_IMAGE,
    allow_shell_urls: bool = False,
) -> Dataset:
    """Indexes existing shards as the dataset `root`/`name`, which holds a manifest alone: they stay where they are.

    With `resizing` it holds new shards of their resized images instead, in their order. Every image is decoded once, so
    that training never meets a damaged one.

    Args:
        patterns: folders, files or URLs with * and {000..123} for "train" and maybe "test".
        sizes: numbers of images in a member of a new shard and in a new shard.
        kind: what the images are, one of KINDS: feature spaces go by it.
        reading: chooses among several images of a sample, and says where its label is.

    Raises:
        DataError: it names the shard.
        UserError: a URL would run a command, and `allow_shell_urls` is false.
    """
    check_name(name)
    urls = {split: list(expand(items)) for split, items in patterns.items()}
    for location in (location for listed in urls.values() for location in listed):
        check_allowed(location, allow_shell_urls)
    indexed: list[Indexed] = []
    remarks = Remarks()
    rows = {split: Rows(_rows(split, listed, reading, indexed, remarks)) for split, listed in urls.items()}
    if resizing != AS_STORED:
        dataset = write_rows(root / name, rows, sizes, resizing, kind, remarks, shuffle=False)
        _say_unlabelled(name, indexed, reading)
        return dataset
    with preparing(root / name) as temporary:
        shape = common_shape((_shape(row, remarks) for split in rows.values() for row in split.rows), remarks)
        class_names = classes_of_labels([(split, shard.name, samples) for split, shard, samples in indexed], "shards")
        _say_unlabelled(name, indexed, reading)
        if not reading.image_key:
            keys = set().union(*(samples.image_keys for _, _, samples in indexed))
            is_default = keys <= {*DEFAULT_READING.image_key.split(";")}
            reading = reading._replace(image_key=DEFAULT_READING.image_key if is_default else ";".join(sorted(keys)))
        splits = {split: tuple(shard for theirs, shard, _ in indexed if theirs == split) for split in patterns}
        dataset = Dataset(root / name, name, shape, class_names, splits, kind=kind, reading=reading)
        return commit(dataset, temporary, remarks)


def _rows(
    split: str, listed: Sequence[str], reading: Reading, indexed: list[Indexed], remarks: Remarks
) -> Iterator[Row]:
    """Yields the images of a split's shards, one of which is in memory at a time, and appends each to `indexed`."""
    for location in bar(iterable=listed, desc=f"indexing {split}", unit="shard"):
        content = read_bytes(location)
        samples = parse_shard(content, location, reading)
        shard = Shard(location, len(samples), len(content), sha256(content).hexdigest())
        indexed.append((split, shard, replace(samples, images=[])))
        for (event, kind), (count, first) in samples.remarks.items():
            remarks.add(event, kind, f"{first} in {location}", count)
        for index, image in enumerate(samples.images):
            label: int | str | None = None if samples.labels is None else int(samples.labels[index])
            if isinstance(label, int) and samples.names:
                label = samples.names[label]
            yield Row(f"an image of {location}", image if isinstance(image, np.ndarray) else BytesIO(image), label)


def _shape(row: Row, remarks: Remarks) -> tuple[str, ImageShape, bool]:
    """Returns what `common_shape` takes of an image, once it is decoded."""
    if isinstance(row.image, np.ndarray):
        return row.name, row.image.shape, False
    return row.name, file_shape(row.image, row.name, remarks, decode=True), True


def _say_unlabelled(name: str, indexed: Sequence[Indexed], reading: Reading) -> None:
    """Prints a line where labels were looked for and none was there."""
    if reading.labels == "none" or any(samples.labels is not None for _, _, samples in indexed):
        return
    folders = sorted(set().union(*(samples.folders for _, _, samples in indexed)))
    hint = ""
    if len(folders) > 1:
        shown = ", ".join(map(repr, folders[:3])) + (", ..." if len(folders) > 3 else "")
        hint = f"; the images lie in the {len(folders)} folders {shown}: --labels folder takes them for classes"
    print_line(
        f"{name}: no image has a label, in .cls, in `label` or `cls` of .json, or in labels.npy of a block{hint}"
    )


def expand(patterns: Iterable[str], inside: Sequence[str] = ("*.tar*", "*.tgz")) -> Iterator[str]:
    """Yields URLs and absolute paths of the files that the patterns name; in a folder those that `inside` matches."""
    for pattern in patterns:
        # The braces of a pipe: belong to its shell.
        for item in [pattern] if scheme(pattern) == "pipe" else braceexpand(pattern):
            if scheme(item):
                yield item
                continue
            path = Path(item).absolute()
            globs = [path / pattern for pattern in inside] if path.is_dir() else [path]
            paths = sorted(file for glob in globs for file in Path(glob.anchor).glob(str(glob)[len(glob.anchor) :]))
            if not paths:
                raise DataError(f"{item} names no file")
            yield from map(str, paths)
