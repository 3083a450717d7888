"""Images as people keep them: folders of image files, and .npz files (see npz.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.data.manifest import DataError, Dataset
from pipeline.data.npz import load_npz

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
ImageShape = tuple[int, int, int]

IMAGE_FILE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
GREY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What PIL raises for content that is not an image, or not all of one."""


class Split(NamedTuple):
    """Images that can be read a few at a time."""

    num_images: int
    labels: Labels | None
    """int64 [num_images]."""
    read: Callable[[npt.NDArray[np.int64]], Images]
    """Indices [n] -> uint8 [n, C, H, W]."""
    files: Sequence[Path] = ()
    """What is read, where that is files."""


def file_shape(file: Path | BinaryIO, name: str, *, decode: bool = False) -> ImageShape:
    """The shape of an encoded image, of which only the header is read unless `decode`. Raises DataError."""
    try:
        with Image.open(file) as image:
            if image.mode not in GREY_MODES | COLOUR_MODES:
                raise DataError(f"{name} has pixels of mode {image.mode}: convert it to 8-bit grey or RGB")
            if decode:
                image.load()
            return 3 if image.mode in COLOUR_MODES else 1, image.height, image.width
    except BROKEN_IMAGE as error:
        raise DataError(f"{name} is damaged or not an image: {error}") from None


def common_shape(found: Iterable[tuple[str, ImageShape, bool]], *, check_size: bool = True) -> ImageShape:
    """The one shape of images, each given with its name and whether it is encoded: then grey may be read as colour.

    Raises DataError naming the first that is not like those before it.
    """
    common: ImageShape | None = None
    for name, (channels, height, width), encoded in found:
        before = common or (channels, height, width)
        if not encoded and channels != before[0]:
            raise DataError(f"{name} has images of {channels} channels, those before it have {before[0]}")
        if check_size and (height, width) != before[1:]:
            raise DataError(
                f"{name} is {height} x {width}, those before it are {before[1]} x {before[2]}: "
                "all images must have one size (of a folder, --size N makes it so)"
            )
        common = (max(channels, before[0]), height, width)
    assert common is not None
    return common


def open_images(path: Path, dataset: Dataset) -> Split:
    """A folder of image files or an `.npz` file, to be compared with a dataset.

    A folder's images become grey for a grey dataset; its subfolders, if they have the names of the dataset's classes,
    and an `.npz` file's labels are the classes that the images should show. Raises DataError naming the file.
    """
    if path.is_dir():
        files, class_names, folders = list_images(path)
        _, height, width = common_shape((str(file), file_shape(file, str(file)), True) for file in files)
        labels = None
        if class_names and set(class_names) <= set(dataset.class_names):
            labels = np.array([dataset.class_names.index(name) for name in class_names], np.int64)[folders]
        shape = (dataset.image_shape[0], height, width)
        found = Split(len(files), labels, partial(read_images, files, shape), files)
    else:
        images, labels = load_npz(path)
        shape = images.shape[1:]
        if not dataset.num_classes:
            labels = None
        if labels is not None and not 0 <= labels.min() <= labels.max() < dataset.num_classes:
            raise DataError(
                f"{path}: labels reach from {labels.min()} to {labels.max()}, not 0 to {dataset.num_classes - 1}"
            )
        found = Split(len(images), labels, images.__getitem__, (path,))
    if shape != dataset.image_shape:
        raise DataError(
            f"{path} holds images of {' x '.join(map(str, shape))}, the dataset {dataset.name} has "
            f"{' x '.join(map(str, dataset.image_shape))}"
        )
    return found


def list_images(folder: Path) -> tuple[list[Path], list[str], Labels]:
    """Image files sorted by path, class names, labels (all 0 without classes)."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    images = [path for path in files if path.suffix.lower() in IMAGE_FILE_SUFFIXES]
    if not images:
        raise DataError(f"{folder} holds no image file ({', '.join(sorted(IMAGE_FILE_SUFFIXES))})")
    if len(files) > len(images):
        tqdm.write(f"{folder}: {len(files) - len(images)} files that are not images are left out", file=sys.stderr)
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in images]
    names = sorted(set(parents))
    if "" in names and len(names) > 1:
        raise DataError(f"{folder} holds images both beside and inside of subfolders: classes are subfolders")
    labels = np.array([names.index(parent) for parent in parents], np.int64)
    return images, [] if names == [""] else names, labels


def read_images(
    files: Sequence[Path],
    image_shape: ImageShape,
    indices: npt.NDArray[np.int64],
    *,
    crop: int | None = None,
    resize: bool = False,
) -> Images:
    """uint8 [n, C, H, W] of the files at `indices` [n]. Raises DataError naming the file."""
    images = np.empty((len(indices), *image_shape), np.uint8)
    for row, index in enumerate(indices):
        try:
            images[row] = decode_image(files[index], image_shape, crop=crop, resize=resize)
        except BROKEN_IMAGE as error:
            raise DataError(f"{files[index]} is damaged: {error}") from None
    return images


def decode_image(
    file: Path | BinaryIO, image_shape: ImageShape, *, crop: int | None = None, resize: bool = False
) -> Images:
    """uint8 [C, H, W], grey when C is 1 and RGB when C is 3; what is transparent lies on white.

    Args:
        crop: side in pixels of the centre square that is cut out first; of odd remainders the larger half is left out
            at the right and at the bottom.
        resize: to the shape, after the centre is cropped to its proportions.

    Raises what BROKEN_IMAGE lists, and ValueError for another size without `resize`.
    """
    channels, height, width = image_shape
    with Image.open(file) as image:
        if not resize and (crop or image.height, crop or image.width) != (height, width):
            raise ValueError(f"an image is {image.height} x {image.width}, not {height} x {width}")
        opaque: Image.Image = image
        if image.has_transparency_data:
            opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        pixels = opaque.convert("L" if channels == 1 else "RGB")
    if crop is not None:
        left, top = (pixels.width - crop) // 2, (pixels.height - crop) // 2
        pixels = pixels.crop((left, top, left + crop, top + crop))
    if resize:
        pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)
