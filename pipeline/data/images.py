"""Images as people keep them: folders of image files, and .npz files (see npz.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.class_names import labels_of
from pipeline.data.decoding import BROKEN_IMAGE, decode_image, file_shape
from pipeline.data.folders import image_files
from pipeline.data.manifest import MAX_VALUES, DataError, Dataset
from pipeline.data.npz import load_npz
from pipeline.data.remarks import Remarks

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
ImageShape = tuple[int, int, int]

MAX_SIZE = 4096
"""Largest side that images are resized to."""


class Split(NamedTuple):
    """Images that can be read a few at a time."""

    num_images: int
    labels: Labels | None
    """int64 [num_images]."""
    read: Callable[[npt.NDArray[np.int64]], Images]
    """Indices [n] -> uint8 [n, C, H, W]."""
    files: Sequence[Path] = ()
    """What is read, where that is files."""


def common_shape(
    found: Iterable[tuple[str, ImageShape, bool]],
    remarks: Remarks,
    *,
    crop: int | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> ImageShape:
    """The one shape that images are read as, each given by its name, shape and whether it is encoded.

    Encoded ones become `channels`, by default RGB if any of them is: those of the other kind are counted. `crop` and
    `size` as in `decode_image`. Raises DataError naming the first that is not like those before it, or too small.
    """
    if size is not None and not 4 <= size <= MAX_SIZE:
        raise DataError(f"--size is {size}: it must lie between 4 and {MAX_SIZE}")
    common: ImageShape | None = None
    kinds: dict[int, tuple[int, str]] = {}
    for name, (depth, *sides), encoded in found:
        if crop is not None and min(sides) < crop:
            raise DataError(
                f"{name} is {sides[0]} x {sides[1]}, which --crop {crop} can't be cut out of: give a smaller one"
            )
        height, width = (size, size) if size else (crop, crop) if crop else sides
        before = common or (depth, height, width)
        if not encoded and depth != before[0]:
            raise DataError(f"{name} has images of {depth} channels, those before it have {before[0]}")
        if (height, width) != before[1:]:
            raise DataError(
                f"{name} is {height} x {width}, those before it are {before[1]} x {before[2]}: "
                "all images must have one size, and --size N makes it so"
            )
        common = (max(depth, before[0]), height, width)
        count, first = kinds.get(depth, (0, name))
        kinds[depth] = count + 1, first
    assert common is not None
    channels = channels or common[0]
    if channels * math.prod(common[1:]) > MAX_VALUES:
        raise DataError(
            f"images of {common[1]} x {common[2]} hold more than {MAX_VALUES:,} numbers, the most of a dataset's: "
            "give --size N"
        )
    if other := kinds.get({1: 3, 3: 1}.get(channels, 0)):
        event, kind = ("read as grey", "colour image") if channels == 1 else ("read as RGB", "grey image")
        remarks.add(event, kind, other[1], other[0])
    return channels, *common[1:]


def open_images(
    path: Path, dataset: Dataset, remarks: Remarks, *, crop: int | None = None, size: int | None = None
) -> Split:
    """A folder of image files or an `.npz` file, to be compared with a dataset.

    A folder's images become grey for a grey dataset and RGB for another; its subfolders, if they have the names of the
    dataset's classes, and an `.npz` file's labels are the classes that the images should show. `crop` and `size` are
    those of `decode_image`. Raises DataError naming the file.
    """
    images: Sequence[Path] | Images
    if path.is_dir():
        images, folders = list_images(path, remarks)
        shapes = ((str(file), file_shape(file, str(file), remarks), True) for file in images)
        shape = common_shape(shapes, remarks, crop=crop, size=size, channels=dataset.image_shape[0])
        labels = labels_of(folders, dataset.class_names)
    else:
        images, labels = load_npz(path)
        shape = common_shape([(str(path), images.shape[1:], False)], remarks, crop=crop, size=size)
        if not dataset.num_classes:
            labels = None
        if labels is not None and not 0 <= labels.min() <= labels.max() < dataset.num_classes:
            raise DataError(
                f"{path}: labels reach from {labels.min()} to {labels.max()}, not 0 to {dataset.num_classes - 1}"
            )
    if shape != dataset.image_shape:
        height, width = dataset.image_shape[1:]
        advice = f": give --size {width}" if shape[0] == dataset.image_shape[0] and height == width else ""
        raise DataError(
            f"{path} holds images of {' x '.join(map(str, shape))}, the dataset {dataset.name} has "
            f"{' x '.join(map(str, dataset.image_shape))}{advice}"
        )
    read = partial(read_images, images, shape, crop=crop, resize=size is not None)
    return Split(len(images), labels, read, images if isinstance(images, list) else (path,))


def list_images(folder: Path, remarks: Remarks) -> tuple[list[Path], list[str]]:
    """Image files sorted by path, and the subfolder that each lies in, its class; of unlabelled images none."""
    images = image_files(folder, remarks)
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in images]
    if "" in parents and any(parents):
        raise DataError(f"{folder} holds images both beside and inside of subfolders: classes are subfolders")
    return images, parents if any(parents) else []


def read_images(
    images: Sequence[Path] | Images,
    image_shape: ImageShape,
    indices: npt.NDArray[np.int64],
    *,
    crop: int | None = None,
    resize: bool = False,
) -> Images:
    """uint8 [n, C, H, W] of the files, or of the images [N, C, H, W], at `indices` [n]. Raises DataError naming the
    file."""
    if isinstance(images, np.ndarray) and crop is None and not resize:
        return images[indices]
    read = np.empty((len(indices), *image_shape), np.uint8)
    for row, index in enumerate(indices):
        try:
            read[row] = decode_image(images[index], image_shape, crop=crop, resize=resize)
        except BROKEN_IMAGE as error:
            raise DataError(f"{images[index]} is damaged: {error}") from None
    return read
