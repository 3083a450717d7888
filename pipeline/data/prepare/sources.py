"""Other people's images as datasets: folders, .npz files, and WebDataset shards, which stay where they are.

What the images are (one of KINDS) is for the caller to say: feature spaces go by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from pipeline.data import locations
from pipeline.data.class_names import classes_of, labels_of, look
from pipeline.data.decoding import BROKEN_IMAGE, decode_image, file_shape
from pipeline.data.folders import splits_in
from pipeline.data.images import (
    Images,
    ImageShape,
    Labels,
    Split,
    common_shape,
    list_images,
    load_npz,
    read_images,
)
from pipeline.data.manifest import FILE_NAME, DataError, Dataset, Shard, load_dataset
from pipeline.data.prepare.commit import DEFAULT_SIZES, ShardSizes, commit, preparing, say, write_shards
from pipeline.data.remarks import Remarks
from pipeline.data.shards import parse_shard
from pipeline.distributed.progress import bar

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
    remarks = Remarks()
    if list(paths) == ["train"] and len(inside := splits_in(paths["train"], remarks)) == 2:
        folders = " and ".join(f"{path.name}/" for path in inside.values())
        say(f"{paths['train']} holds {folders}: they are read as the splits train and test, not as classes")
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

    Each holds `images` uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3 and maybe `labels`, integers [N].
    Raises DataError naming the file.
    """
    arrays = {split: load_npz(path) for split, path in paths.items()}
    shapes = ((str(paths[split]), images.shape[1:], False) for split, (images, _) in arrays.items())
    remarks = Remarks()
    shape = common_shape(shapes, remarks, crop=crop, size=size)
    class_names = _numbered_classes([(str(paths[split]), arrays[split][1]) for split in paths], "files")
    splits = {
        split: Split(len(images), labels, partial(read_images, images, shape, crop=crop, resize=size is not None))
        for split, (images, labels) in arrays.items()
    }
    return _write(Dataset(root / name, name, shape, class_names, {}, kind=kind), splits, sizes, remarks)


def index_shards(
    root: Path,
    name: str,
    patterns: dict[str, Sequence[str]],
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    allow_shell_urls: bool = False,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
) -> Dataset:
    """Existing WebDataset shards as `root`/`name`, which holds a manifest alone: they stay where they are.

    With `crop` or `size`, as of a folder, it holds their images instead, cropped and resized, in their order and in
    shards of `sizes`. `patterns` gives, for "train" and maybe "test", folders, files or URLs with * and {000..123}.
    Every image is decoded once, so that training never meets a damaged one. Raises DataError naming the shard.
    """
    locations_of = {split: list(_expand(items)) for split, items in patterns.items()}
    for location in (location for found in locations_of.values() for location in found):
        locations.check_allowed(location, allow_shell_urls)
    labels: dict[str, list[tuple[str, Labels | None]]] = {split: [] for split in patterns}
    splits: dict[str, tuple[Shard, ...]] = {split: () for split in patterns}
    remarks = Remarks()

    def index() -> Iterator[tuple[str, ImageShape, bool]]:
        for split, found in locations_of.items():
            for location in bar(iterable=found, desc=f"indexing {split}", unit="shard"):
                content = locations.read_bytes(location)
                samples = parse_shard(content, location)
                labels[split].append((location, samples.labels))
                splits[split] += (Shard(location, len(samples), len(content), sha256(content).hexdigest()),)
                if isinstance(samples.images, np.ndarray):
                    yield location, samples.images.shape[1:], False
                    continue
                image_name = f"an image of {location}"
                for encoded in samples.images:
                    yield image_name, file_shape(BytesIO(encoded), image_name, remarks, decode=True), True

    with preparing(root, name) as temporary:
        shape = common_shape(index(), remarks, crop=crop, size=size)
        class_names = _numbered_classes([each for found in labels.values() for each in found], "shards")
        dataset = Dataset(root / name, name, shape, class_names, splits, kind=kind)
        if crop is None and size is None:
            return commit(dataset, temporary, remarks)
        written = write_shards(
            temporary,
            {
                split: Split(
                    dataset.num_images(split),
                    np.concatenate([each for _, each in labels[split] if each is not None]) if class_names else None,
                    _reader(shards, shape, crop, size is not None),
                )
                for split, shards in splits.items()
            },
            sizes,
            shuffle=False,
        )
        return commit(replace(dataset, splits=written), temporary, remarks)


def _reader(
    shards: Sequence[Shard], shape: ImageShape, crop: int | None, resize: bool
) -> Callable[[npt.NDArray[np.int64]], Images]:
    """Reads images of shards by their number in all of them, one shard in memory at a time."""
    ends = np.cumsum([shard.num_images for shard in shards])

    @lru_cache(maxsize=1)
    def images_of(location: str) -> Images | list[memoryview]:
        return parse_shard(locations.read_bytes(location), location).images

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
