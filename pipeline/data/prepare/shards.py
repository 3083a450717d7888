"""Existing WebDataset shards as datasets: an index of where they are, or, resized, shards of their images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand

from pipeline.data.class_names import classes_of_labels
from pipeline.data.dataset import (
    DEFAULT_READING,
    DataError,
    Dataset,
    Reading,
    Remarks,
    Shard,
    check_allowed,
    read_bytes,
    scheme,
)
from pipeline.data.images import AS_STORED, CommonShape, Resizing, Row
from pipeline.data.prepare.commit import (
    DEFAULT_SIZES,
    Rows,
    ShardSizes,
    check_name,
    commit,
    preparing,
    print_line,
    write_rows,
)
from pipeline.data.shards import parse_shard
from pipeline.distributed.progress import bar

ANY_IMAGE = Reading(image_key="")
"""Takes whichever image a sample has, and refuses several."""
MAX_FILES = 1_000_000
"""The most names that a pattern's ranges may stand for."""


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
    indexed, remarks = list[_Indexed](), Remarks()
    rows = {split: _rows(split, listed, reading, indexed, remarks) for split, listed in urls.items()}
    if resizing != AS_STORED:
        splits = {split: Rows(images, f"the {split} split") for split, images in rows.items()}
        dataset = write_rows(root / name, splits, sizes, resizing, kind, remarks, shuffle=False)
    else:
        with preparing(root / name) as temporary:
            common = CommonShape(remarks, decode=True)
            for row in chain.from_iterable(rows.values()):
                common.add(row)
            class_names = classes_of_labels([(each.split, each.shard.name, each.labels) for each in indexed])
            if not reading.image_key:
                keys, default = set().union(*(each.image_keys for each in indexed)), DEFAULT_READING.image_key
                key = default if keys <= {*default.split(";")} else ";".join(sorted(keys))
                reading = reading._replace(image_key=key)
            shards = {split: tuple(each.shard for each in indexed if each.split == split) for split in urls}
            dataset = Dataset(root / name, name, common.of_all(), class_names, shards, kind=kind, reading=reading)
            dataset = commit(dataset, temporary, remarks)
    if not dataset.num_classes and reading.labels != "none":
        print_line(
            f"{name}: no image has a label, in .cls, in `label` or `cls` of .json, or in labels.npy of a block "
            "(--labels folder takes the folders that images lie in for classes)"
        )
    return dataset


class _Indexed(NamedTuple):
    """A shard that was read once."""

    split: str
    shard: Shard
    """Its name is its path or URL."""
    labels: set[int | str | None]
    image_keys: frozenset[str]


def _rows(
    split: str, listed: Sequence[str], reading: Reading, indexed: list[_Indexed], remarks: Remarks
) -> Iterator[Row]:
    """Yields the images of a split's shards, one of which is in memory at a time, and appends each to `indexed`."""
    for location in bar(iterable=listed, desc=f"indexing {split}", unit="shard"):
        content = read_bytes(location)
        samples = parse_shard(content, location, reading)
        shard = Shard(location, len(samples), len(content), sha256(content).hexdigest())
        labels = [None] * len(samples) if samples.labels is None else samples.labels.tolist()
        indexed.append(_Indexed(split, shard, set(labels), samples.image_keys))
        for (event, kind), (count, first) in samples.remarks.items():
            remarks.add(event, kind, f"{first} in {location}", count)
        for image, label in zip(samples.images, labels, strict=True):
            yield Row(f"an image of {location}", image if isinstance(image, np.ndarray) else BytesIO(image), label)


def expand(patterns: Iterable[str], inside: Sequence[str] = ("*.tar*", "*.tgz")) -> Iterator[str]:
    """Yields URLs and absolute paths of the files that the patterns name; in a folder those that `inside` matches."""
    for pattern in patterns:
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
        if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_FILES:
            raise DataError(f"{pattern} stands for more than {MAX_FILES:,} files: shorten its ranges")
        # The braces of a pipe: belong to its shell.
        for item in [pattern] if scheme(pattern) == "pipe" else braceexpand(pattern):
            if scheme(item):
                yield item
                continue
            path = Path(item).absolute()
            if path.is_dir():
                paths = {file for pattern in inside for file in path.glob(pattern)}
            else:  # its name may itself look like a pattern
                paths = {path} if path.exists() else {*Path(path.anchor).glob(str(path)[len(path.anchor) :])}
            if not paths:
                raise DataError(f"{item} names no file")
            yield from map(str, sorted(paths))
