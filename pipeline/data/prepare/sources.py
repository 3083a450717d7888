"""Other people's images as datasets: folders, .npz files, and WebDataset shards, which stay where they are.

What the images are (one of KINDS) is for the caller to say: feature spaces go by it.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from pipeline.data import locations
from pipeline.data.class_names import classes_of, find_class, labels_of, look
from pipeline.data.decoding import BROKEN_IMAGE, decode_image, file_shape
from pipeline.data.folders import splits_in
from pipeline.data.images import (
    Images,
    ImageShape,
    Labels,
    Split,
    common_shape,
    list_images,
    read_images,
)
from pipeline.data.manifest import DEFAULT_READING, FILE_NAME, LABELS, DataError, Dataset, Reading, Shard, load_dataset
from pipeline.data.npz import array_names, holds_split, load_npz
from pipeline.data.prepare.commit import DEFAULT_SIZES, ShardSizes, check_name, commit, preparing, say, write_shards
from pipeline.data.remarks import Remarks
from pipeline.data.shards import Samples, numbered, parse_shard
from pipeline.distributed.progress import bar

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
    unlabelled. Subfolders whose names look the same are one class (class_names.py). A single folder that holds train/
    and test/ (or val/) is both. All grey: C = 1; otherwise RGB. `crop` cuts the centre square of so many pixels a side
    out of each; `size` then crops what is there to a square and resizes it. Raises DataError naming the file for images
    that do not decode, are smaller than `crop`, or differ in size without either.
    """
    check_name(name)
    remarks = Remarks()
    if list(paths) == ["train"] and len(inside := splits_in(paths["train"], remarks)) == 2:
        named = " and ".join(f"{path.name}/" for path in inside.values())
        say(f"{paths['train']} holds {named}: they are read as the splits train and test, not as classes")
        paths = inside
    listings = {split: list_images(path, remarks) for split, path in paths.items()}
    class_names = _folder_classes({paths[split]: folders for split, (_, folders) in listings.items()}, root / name)
    every = bar(iterable=[file for files, _ in listings.values() for file in files], desc="checking", unit="image")
    shapes = ((str(file), file_shape(file, str(file), remarks), True) for file in every)
    shape = common_shape(shapes, remarks, crop=crop, size=size)
    splits = {}
    for split, (files, folders) in listings.items():
        read = partial(read_images, files, shape, crop=crop, resize=size is not None)
        splits[split] = Split(len(files), labels_of(folders, class_names), read)
    return _write(Dataset(root / name, name, shape, class_names, {}, kind=kind), splits, sizes, remarks)


def _folder_classes(folders: dict[Path, list[str]], dataset: Path) -> tuple[str, ...]:
    """The classes' names of splits, of which each must have all. A dataset that is there already keeps its names and
    their order, so that the command that prepared it in an earlier version finds it again.

    Args:
        folders: of each split's folder the subfolders of its images.
        dataset: the dataset's folder.
    """
    classes = classes_of(name for names in folders.values() for name in names)
    for path, names in folders.items():
        if missing := [name for name, alike in classes.items() if not set(alike) & set(names)]:
            raise DataError(f"{path} has no images of the classes {missing}: every split must have all classes")
    if (dataset / FILE_NAME).exists():
        existing = load_dataset(dataset, allow_shell_urls=True).class_names
        if set(map(look, existing)) == set(map(look, classes)):
            return existing
    for name, alike in classes.items():
        if len(alike) > 1:
            say(f"{', '.join(map(repr, alike))} look the same: they are one class, {name!r}")
    return tuple(classes)


def prepare_npz(
    root: Path,
    name: str,
    paths: dict[str, Path],
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
) -> Dataset:
    """`.npz` files for "train" and maybe "test" as `root`/`name`, shuffled once; `crop` and `size` as of a folder.

    Each holds images [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3 and maybe labels, integers [N] or one-hot;
    see npz.py for their names and scales. A file of both splits (`x_train` and `x_test`) needs no other for "test".
    Raises DataError naming the file.
    """
    check_name(name)
    if "test" not in paths and holds_split(paths["train"], "test"):
        paths = paths | {"test": paths["train"]}
    arrays, remarks = {split: load_npz(path, split) for split, path in paths.items()}, Remarks()
    shapes = ((str(paths[split]), images.shape[1:], False) for split, (images, _) in arrays.items())
    shape = common_shape(shapes, remarks, crop=crop, size=size)
    class_names = _numbered_classes([(str(paths[split]), arrays[split][1]) for split in paths], "files")
    splits = {
        split: Split(len(images), labels, partial(read_images, images, shape, crop=crop, resize=size is not None))
        for split, (images, labels) in arrays.items()
    }
    for path in dict.fromkeys(paths.values()):
        unread = [set(array_names(path, split)[2]) for split in paths if paths[split] == path]
        for array in sorted(set.intersection(*unread)):
            remarks.add("left out", "array", f"{array!r} in {path}")
    return _write(Dataset(root / name, name, shape, class_names, {}, kind=kind), splits, sizes, remarks)


def index_shards(
    root: Path,
    name: str,
    patterns: dict[str, Sequence[str]],
    *,
    allow_shell_urls: bool = False,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
    reading: Reading = ANY_IMAGE,
) -> Dataset:
    """Existing WebDataset shards as `root`/`name`, which holds a manifest alone: they stay where they are.

    With `crop` or `size`, as of a folder, it holds their images instead, cropped and resized, in their order.
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
    remarks = Remarks()

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
                    yield image_name, file_shape(BytesIO(encoded), image_name, remarks, decode=True), True

    with preparing(root, name) as temporary:
        shape = common_shape(index(), remarks, crop=crop, size=size)
        class_names = _shard_classes(found)
        image_keys = set().union(*(samples.image_keys for _, _, samples in found))
        if not reading.image_key:
            is_default = image_keys <= {*DEFAULT_READING.image_key.split(";")}
            key = DEFAULT_READING.image_key if is_default else ";".join(sorted(image_keys))
            reading = reading._replace(image_key=key)
        if not class_names and reading.labels != "none":
            _say_unlabelled(name, found)
        for _, location, samples in found:
            for (event, kind_of_member), (count, first) in samples.remarks.items():
                remarks.add(event, kind_of_member, f"{first} in {location}", count)
        dataset = Dataset(root / name, name, shape, class_names, splits, kind=kind, reading=reading)
        if crop is None and size is None:
            return commit(dataset, temporary, remarks)

        def labels(split: str) -> Labels | None:
            own = [numbered(samples, class_names) for each, _, samples in found if each == split]
            return np.concatenate([numbers for numbers in own if numbers is not None]) if class_names else None

        read = partial(_reader, dataset, crop, size is not None)
        rows = {split: Split(dataset.num_images(split), labels(split), read(split)) for split in splits}
        written = write_shards(temporary, rows, DEFAULT_SIZES, shuffle=False)
        return commit(replace(dataset, splits=written, reading=DEFAULT_READING), temporary, remarks)


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
    classes = tuple(classes_of(names["train"]))
    if untrained := sorted(name for name in names["test"] if find_class(name, classes) is None):
        raise DataError(f"the test shards have images of {untrained[0]!r}, the training shards have none")
    return classes


def _say_unlabelled(name: str, found: Sequence[tuple[str, str, Samples]]) -> None:
    folders = sorted(set().union(*(samples.folders for _, _, samples in found)))
    hint = ""
    if len(folders) > 1:
        shown = ", ".join(map(repr, folders[:3])) + (", ..." if len(folders) > 3 else "")
        hint = f"; the images lie in the {len(folders)} folders {shown}: --labels folder takes them for classes"
    say(f"{name}: no image has a label, in .cls, in `label` or `cls` of .json, or in labels.npy of a block{hint}")


def _reader(dataset: Dataset, crop: int | None, resize: bool, split: str) -> Callable[[npt.NDArray[np.int64]], Images]:
    """Reads images of a split's shards by their number in all of them, one shard in memory at a time."""
    shards, shape = dataset.shards(split), dataset.image_shape
    ends = np.cumsum([shard.num_images for shard in shards])

    @lru_cache(maxsize=1)
    def images_of(location: str) -> Images | list[memoryview]:
        return parse_shard(locations.read_bytes(location), location, dataset.reading).images

    def read(indices: npt.NDArray[np.int64]) -> Images:
        images = np.empty((len(indices), *shape), np.uint8)
        for row, index in enumerate(indices):
            number = int(np.searchsorted(ends, index, side="right"))
            location = shards[number].name
            image = images_of(location)[index - ends[number]]  # counted from the shard's end
            try:
                file = image if isinstance(image, np.ndarray) else BytesIO(image)
                images[row] = decode_image(file, shape, crop=crop, resize=resize)
            except BROKEN_IMAGE as error:
                raise DataError(f"an image of {location} is damaged: {error}") from None
        return images

    return read


def _write(dataset: Dataset, splits: dict[str, Split], sizes: ShardSizes, remarks: Remarks) -> Dataset:
    """Writes and commits what `dataset` describes but for its shards."""
    with preparing(dataset.folder.parent, dataset.name) as temporary:
        shards = write_shards(temporary, splits, sizes, shuffle=True)
        return commit(replace(dataset, splits=shards), temporary, remarks)


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
