"""Existing WebDataset shards as datasets: an index of where they are, or, resized, shards of their images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand

from pipeline.data import locations
from pipeline.data.class_names import classes_of, find_class, numbered_classes
from pipeline.data.dataset import DEFAULT_READING, DataError, Dataset, ImageShape, Reading, Remarks, Shard
from pipeline.data.images import AS_STORED, Pixels, Resizing, Split, common_shape, file_shape, image_reader
from pipeline.data.prepare.commit import (
    DEFAULT_SIZES,
    ShardSizes,
    check_name,
    commit,
    preparing,
    print_line,
    write_shards,
)
from pipeline.data.shards import Images, Samples, numbered, parse_shard
from pipeline.distributed.progress import bar

ANY_IMAGE = Reading(image_key="")
"""Takes whichever image a sample has, and refuses several."""
MAX_SHARDS = 1_000_000
"""The most shards that a pattern in braces may name."""


class Indexed(NamedTuple):
    """A shard that was read once."""

    split: str
    shard: Shard
    """Its name is its path or URL."""
    samples: Samples
    """All but the images."""


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
    urls = {split: list(_expand(items)) for split, items in patterns.items()}
    for location in (location for listed in urls.values() for location in listed):
        locations.check_allowed(location, allow_shell_urls)
    indexed: list[Indexed] = []
    remarks = Remarks()
    with preparing(root / name) as temporary:
        shape = common_shape(_read_all(urls, reading, indexed, remarks), remarks, resizing)
        class_names = _class_names(indexed)
        if not class_names and reading.labels != "none":
            _say_unlabelled(name, indexed)
        if not reading.image_key:
            keys = set().union(*(item.samples.image_keys for item in indexed))
            is_default = keys <= {*DEFAULT_READING.image_key.split(";")}
            reading = reading._replace(image_key=DEFAULT_READING.image_key if is_default else ";".join(sorted(keys)))
        splits = {split: tuple(item.shard for item in indexed if item.split == split) for split in patterns}
        dataset = Dataset(root / name, name, shape, class_names, splits, kind=kind, reading=reading)
        if resizing != AS_STORED:
            images = {split: _split(split, dataset, indexed, resizing) for split in splits}
            splits = write_shards(temporary, images, sizes, shuffle=False)
            dataset = replace(dataset, splits=splits, reading=DEFAULT_READING)
        return commit(dataset, temporary, remarks)


def _read_all(
    urls: dict[str, list[str]], reading: Reading, indexed: list[Indexed], remarks: Remarks
) -> Iterator[tuple[str, ImageShape, bool]]:
    """Yields shapes for `common_shape` of what the shards hold, and appends each shard to `indexed`."""
    for split, listed in urls.items():
        for location in bar(iterable=listed, desc=f"indexing {split}", unit="shard"):
            content = locations.read_bytes(location)
            samples = parse_shard(content, location, reading)
            shard = Shard(location, len(samples), len(content), sha256(content).hexdigest())
            indexed.append(Indexed(split, shard, replace(samples, images=[])))
            for (event, kind), (count, first) in samples.remarks.items():
                remarks.add(event, kind, f"{first} in {location}", count)
            if isinstance(samples.images, np.ndarray):
                yield location, samples.images.shape[1:], False
                continue
            for encoded in samples.images:
                name = f"an image of {location}"
                yield name, file_shape(BytesIO(encoded), name, remarks, decode=True), True


def _class_names(indexed: Sequence[Indexed]) -> tuple[str, ...]:
    """Returns the class names of shards: the names in their labels, or the numbers."""
    if not any(item.samples.names for item in indexed):
        return numbered_classes([(item.shard.name, item.samples.labels) for item in indexed], "shards")
    if other := next((item.shard.name for item in indexed if not item.samples.names), None):
        raise DataError(f"{other} has no names as labels, other shards have: label all of them in one way")
    names: dict[str, set[str]] = {"train": set(), "test": set()}
    for item in indexed:
        names[item.split] |= set(item.samples.names)
    classes = tuple(classes_of(names["train"]))
    if untrained := sorted(name for name in names["test"] if find_class(name, classes) is None):
        raise DataError(f"the test shards have images of {untrained[0]!r}, the training shards have none")
    return classes


def _say_unlabelled(name: str, indexed: Sequence[Indexed]) -> None:
    folders = sorted(set().union(*(item.samples.folders for item in indexed)))
    hint = ""
    if len(folders) > 1:
        shown = ", ".join(map(repr, folders[:3])) + (", ..." if len(folders) > 3 else "")
        hint = f"; the images lie in the {len(folders)} folders {shown}: --labels folder takes them for classes"
    print_line(
        f"{name}: no image has a label, in .cls, in `label` or `cls` of .json, or in labels.npy of a block{hint}"
    )


def _split(split: str, dataset: Dataset, indexed: Sequence[Indexed], resizing: Resizing) -> Split:
    """Returns the images of a split's shards, to be read in their order: one shard is held in memory at a time."""
    items = [item for item in indexed if item.split == split]
    labels = [numbered(item.samples, dataset.class_names) for item in items]
    ends = np.cumsum([item.shard.num_images for item in items])

    @lru_cache(maxsize=1)
    def images_of(location: str) -> Images | list[memoryview]:
        return parse_shard(locations.read_bytes(location), location, dataset.reading).images

    def pixels_of(index: int) -> tuple[str, Pixels]:
        number = int(np.searchsorted(ends, index, side="right"))
        location = items[number].shard.name
        image = images_of(location)[index - ends[number]]  # counted from the shard's end
        return f"an image of {location}", image if isinstance(image, np.ndarray) else BytesIO(image)

    read = image_reader(pixels_of, dataset.image_shape, resizing)
    together = np.concatenate([numbers for numbers in labels if numbers is not None]) if dataset.class_names else None
    return Split(int(ends[-1]), together, read)


def _expand(patterns: Iterable[str]) -> Iterator[str]:
    """Yields URLs and absolute paths of the shards that the patterns name."""
    for pattern in patterns:
        # The braces of a pipe: belong to its shell.
        for item in [pattern] if locations.scheme(pattern) == "pipe" else _without_braces(pattern):
            if locations.scheme(item):
                yield item
                continue
            path = Path(item).absolute()
            inside = [path / "*.tar*", path / "*.tgz"] if path.is_dir() else [path]
            paths = sorted(file for glob in inside for file in Path(glob.anchor).glob(str(glob)[len(glob.anchor) :]))
            if not paths:
                raise DataError(f"{item} names no shard")
            yield from map(str, paths)


def _without_braces(pattern: str) -> Iterator[str]:
    # A range is a list in memory before its first item is there; several multiply while they are walked through.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    items = () if any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ranges) else braceexpand(pattern)
    count = 0
    for count, item in enumerate(items, 1):
        if count > MAX_SHARDS:
            break
        yield item
    if not 0 < count <= MAX_SHARDS:
        raise DataError(f"{pattern} names more than {MAX_SHARDS:,} shards")
