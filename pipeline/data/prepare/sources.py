"""Other people's images as datasets: folders, .npz files, and WebDataset shards, which stay where they are.

What the images are (one of KINDS) is for the caller to say: feature spaces go by it.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from pipeline.data import locations
from pipeline.data.images import ImageShape, Labels, Split, common_shape, file_shape, list_images, read_images
from pipeline.data.manifest import DEFAULT_READING, LABELS, DataError, Dataset, Reading, Shard
from pipeline.data.npz import array_names, holds_split, load_npz
from pipeline.data.prepare.commit import DEFAULT_SIZES, ShardSizes, check_name, commit, preparing, say, write_shards
from pipeline.data.remarks import Remarks
from pipeline.data.shards import Samples, parse_shard
from pipeline.progress import bar

MAX_SIZE = 4096
"""Largest side that images are resized to."""
ANY_IMAGE = Reading(image_key="")
"""Takes whichever image a sample has, and refuses several."""
MAX_SHARDS = 1_000_000
"""Most shards that a pattern in braces may name."""


def prepare_folder(
    root: Path,
    name: str,
    paths: dict[str, Path],
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
) -> Dataset:
    """Image files as `root`/`name`, shuffled once (a folder is sorted by class, a shard must not be).

    `paths` gives a folder for "train" and maybe "test"; its subfolders are the classes, without any the images are
    unlabelled. All grey: C = 1; otherwise RGB. `crop` cuts the centre square of so many pixels a side out of each;
    `size` then crops what is there to a square and resizes it. Raises DataError naming the file for images that do not
    decode, are smaller than `crop`, or differ in size without either.
    """
    check_name(name)
    if size is not None and not 4 <= size <= MAX_SIZE:
        raise DataError(f"--size is {size}: it must lie between 4 and {MAX_SIZE}")
    listings = {split: list_images(path) for split, path in paths.items()}
    class_names = listings["train"][1]
    for split, (_, names, _) in listings.items():
        if names != class_names:
            raise DataError(f"{paths[split]} has the classes {names}, {paths['train']} has {class_names}")
    every = bar(iterable=[file for files, _, _ in listings.values() for file in files], desc="checking", unit="image")
    found = common_shape(((str(file), _shape(file, crop), True) for file in every), check_size=size is None)
    shape = (found[0], size or found[1], size or found[2])
    splits = {}
    for split, (files, _, labels) in listings.items():
        read = partial(read_images, files, shape, crop=crop, resize=size is not None)
        splits[split] = Split(len(files), labels if class_names else None, read)
    return _write(Dataset(root / name, name, shape, tuple(class_names), {}, kind=kind), splits, sizes)


def _shape(file: Path, crop: int | None) -> ImageShape:
    channels, height, width = file_shape(file, str(file))
    if crop is None:
        return channels, height, width
    if min(height, width) < crop:
        raise DataError(f"{file} is {height} x {width}, which --crop {crop} can't be cut out of: give a smaller one")
    return channels, crop, crop


def prepare_npz(
    root: Path, name: str, paths: dict[str, Path], sizes: ShardSizes = DEFAULT_SIZES, *, kind: str = "own"
) -> Dataset:
    """`.npz` files for "train" and maybe "test" as `root`/`name`, shuffled once.

    Each holds images [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3 and maybe labels, integers [N] or one-hot;
    see npz.py for their names and scales. A file of both splits (`x_train` and `x_test`) needs no other for "test".
    Raises DataError naming the file.
    """
    check_name(name)
    if "test" not in paths and holds_split(paths["train"], "test"):
        paths = paths | {"test": paths["train"]}
    arrays = {split: load_npz(path, split) for split, path in paths.items()}
    shape = common_shape((str(paths[split]), arrays[split][0].shape[1:], False) for split in paths)
    class_names = _numbered_classes([(str(paths[split]), arrays[split][1]) for split in paths], "files")
    splits = {split: Split(len(images), labels, images.__getitem__) for split, (images, labels) in arrays.items()}
    for path in dict.fromkeys(paths.values()):
        unread = [set(array_names(path, split)[2]) for split in paths if paths[split] == path]
        if left_out := sorted(set.intersection(*unread)):
            say(f"{path}: left out: arrays {', '.join(map(repr, left_out))}")
    return _write(Dataset(root / name, name, shape, class_names, {}, kind=kind), splits, sizes)


def index_shards(
    root: Path,
    name: str,
    patterns: dict[str, Sequence[str]],
    *,
    allow_shell_urls: bool = False,
    kind: str = "own",
    reading: Reading = ANY_IMAGE,
) -> Dataset:
    """Existing WebDataset shards as `root`/`name`, which holds a manifest alone: they stay where they are.

    `patterns` gives, for "train" and maybe "test", folders, files or URLs with * and {000..123}. Every image is decoded
    once, so that training never meets a damaged one. `reading` chooses among several images of a sample, and where its
    label is. Raises DataError naming the shard.
    """
    check_name(name)
    locations_of = {split: list(_expand(items)) for split, items in patterns.items()}
    for location in (location for found in locations_of.values() for location in found):
        locations.check_allowed(location, allow_shell_urls)
    found: list[tuple[str, str, Samples]] = []
    splits: dict[str, tuple[Shard, ...]] = {split: () for split in patterns}

    def index() -> Iterator[tuple[str, ImageShape, bool]]:
        for split, urls in locations_of.items():
            for location in bar(iterable=urls, desc=f"indexing {split}", unit="shard"):
                content = locations.read_bytes(location)
                samples = parse_shard(content, location, reading)
                found.append((split, location, replace(samples, images=[])))
                splits[split] += (Shard(location, len(samples), len(content), sha256(content).hexdigest()),)
                if isinstance(samples.images, np.ndarray):
                    yield location, samples.images.shape[1:], False
                    continue
                image_name = f"an image of {location}"
                for encoded in samples.images:
                    yield image_name, file_shape(BytesIO(encoded), image_name, decode=True), True

    with preparing(root, name) as temporary:
        shape = common_shape(index())
        class_names = _shard_classes(found)
        image_keys = set().union(*(samples.image_keys for _, _, samples in found))
        if not reading.image_key:
            is_default = image_keys <= {*DEFAULT_READING.image_key.split(";")}
            key = DEFAULT_READING.image_key if is_default else ";".join(sorted(image_keys))
            reading = reading._replace(image_key=key)
        if not class_names and reading.labels != "none":
            _say_unlabelled(name, found)
        remarks = Remarks()
        for _, location, samples in found:
            for (event, kind_of_member), (count, first) in samples.remarks.items():
                remarks.add(event, kind_of_member, f"{first} in {location}", count)
        if remarks:
            say(f"{name}: {remarks}")
        return commit(Dataset(root / name, name, shape, class_names, splits, kind=kind, reading=reading), temporary)


def add_shard_options(parser: ArgumentParser) -> None:
    """Adds the options that `shard_options` reads."""
    parser.add_argument(
        "--image-key", default="", metavar="KEY", help="which image of a sample: png, seg.png, 'jpg;png'"
    )
    parser.add_argument("--labels", choices=LABELS, default="members", help="members: .cls or .json (the default)")
    parser.add_argument("--allow_shell_urls", action="store_true", help="let URLs run commands (pipe: and the like)")


def shard_options(arguments: Namespace) -> dict[str, Any]:
    """The options of a command line as arguments of `index_shards`."""
    reading = Reading(arguments.image_key.lower(), arguments.labels)
    return {"reading": reading, "allow_shell_urls": arguments.allow_shell_urls}


def _shard_classes(found: Sequence[tuple[str, str, Samples]]) -> tuple[str, ...]:
    """Class names of shards, each given with its split and location: the names in their labels, or the numbers."""
    if not any(samples.names for _, _, samples in found):
        return _numbered_classes([(location, samples.labels) for _, location, samples in found], "shards")
    if other := next((location for _, location, samples in found if not samples.names), None):
        raise DataError(f"{other} has no names as labels, other shards have: label all of them in one way")
    names: dict[str, set[str]] = {"train": set(), "test": set()}
    for split, _, samples in found:
        names[split] |= set(samples.names)
    if untrained := sorted(names["test"] - names["train"]):
        raise DataError(f"the test shards have images of {untrained[0]!r}, the training shards have none")
    return tuple(sorted(names["train"]))


def _say_unlabelled(name: str, found: Sequence[tuple[str, str, Samples]]) -> None:
    folders = sorted(set().union(*(samples.folders for _, _, samples in found)))
    hint = ""
    if len(folders) > 1:
        shown = ", ".join(map(repr, folders[:3])) + (", ..." if len(folders) > 3 else "")
        hint = f"; the images lie in the {len(folders)} folders {shown}: --labels folder takes them for classes"
    say(f"{name}: no image has a label, in .cls, in `label` or `cls` of .json, or in labels.npy of a block{hint}")


def _write(dataset: Dataset, splits: dict[str, Split], sizes: ShardSizes) -> Dataset:
    """Writes and commits what `dataset` describes but for its shards."""
    with preparing(dataset.folder.parent, dataset.name) as temporary:
        shards = write_shards(temporary, splits, sizes, shuffle=True)
        return commit(replace(dataset, splits=shards), temporary)


def _numbered_classes(found: Sequence[tuple[str, Labels | None]], what: str) -> tuple[str, ...]:
    """Class names 0, 1, ... up to the highest label of several files, which go by these names.

    Raises DataError unless all have labels or none has, and the labels are all of 0, 1, ..., K - 1: a gap is a class
    that no image shows.
    """
    present = [np.unique(labels) for _, labels in found if labels is not None]
    if len(present) < len(found):
        if present:
            raise DataError(f"some of the {what} have labels and others have none")
        return ()
    classes = np.unique(np.concatenate(present))
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        name, labels = next((name, seen) for (name, _), seen in zip(found, present, strict=True) if classes[-1] in seen)
        raise DataError(
            f"{name} has labels from {labels[0]} to {labels[-1]}, but the {what} show {len(classes)} classes: "
            f"number them 0 to {len(classes) - 1}"
        )
    return tuple(map(str, range(len(classes))))


def _without_braces(pattern: str) -> Iterator[str]:
    # A range is a list in memory before its first item is had; several multiply as they are walked.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    items = () if any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ranges) else braceexpand(pattern)
    count = 0
    for count, item in enumerate(items, 1):
        if count > MAX_SHARDS:
            break
        yield item
    if not 0 < count <= MAX_SHARDS:
        raise DataError(f"{pattern} names more than {MAX_SHARDS:,} shards")


def _expand(patterns: Iterable[str]) -> Iterator[str]:
    """URLs and absolute paths of the shards that the patterns name."""
    for pattern in patterns:
        # The braces of a pipe: belong to its shell.
        for item in [pattern] if locations.scheme(pattern) == "pipe" else _without_braces(pattern):
            if locations.scheme(item):
                yield item
                continue
            path = Path(item).absolute()
            inside = [path / "*.tar*", path / "*.tgz"] if path.is_dir() else [path]
            paths = sorted(found for each in inside for found in Path(each.anchor).glob(str(each)[len(each.anchor) :]))
            if not paths:
                raise DataError(f"{item} names no shard")
            yield from map(str, paths)
