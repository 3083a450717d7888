"""Images and labels in .npz files as people keep them: names of arrays, order of axes, scales of values.

What is unambiguous is read, everything else is refused with the type, shape and range that the array has. Nothing is
ever unpickled.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import DataError

if TYPE_CHECKING:
    from pipeline.data.images import Images, Labels

NAMES = {
    "images": ("", "labels"),
    "x": ("", "y"),
    "arr_0": ("", "arr_1"),
    "x_train": ("train", "y_train"),
    "x_test": ("test", "y_test"),
    "train_images": ("train", "train_labels"),
    "test_images": ("test", "test_labels"),
}
"""Names of an array of images in lower case, each with the split that it is ("" is any) and the name of its labels."""
BROKEN_HEADER = (SyntaxError, tokenize.TokenError)
"""What numpy raises besides ValueError for the header of an array, which is a Python literal."""
_BROKEN_FILE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, RuntimeError, *BROKEN_HEADER)
TOLERANCE = 1e-4
"""Floats may lie so far outside of their scale, by rounding."""


def array_names(path: Path, split: str) -> tuple[str, str | None, list[str]]:
    """Finds the arrays of a split: the name of the images, the name of their labels, and all the others' names.

    Args:
        split: "train", "test", or "" for a file of images that are no split of a dataset.

    Raises DataError when there are no images of that split, or several.
    """
    return _choose(path, _headers(path), split)


def holds_split(path: Path, split: str) -> bool:
    """Whether the file has an array of images that is named after the split."""
    return any(NAMES.get(name.lower(), ("",))[0] == split for name in _headers(path))


def load_npz(path: Path, split: str = "") -> tuple[Images, Labels | None]:
    """Reads images uint8 [N, C, H, W] and labels int64 [N], see `array_names`. Raises DataError naming the file."""
    headers = _headers(path)
    images_name, labels_name, _ = _choose(path, headers, split)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in (images_name, labels_name) if labels_name else (images_name,):
        dtype, shape = headers[name]
        if dtype.hasobject:
            raise DataError(
                f"{path}: {name} is an array {shape} of Python objects, which are pickled and never loaded: store "
                "images of one size as uint8 [N, H, W, C], and labels as integers [N]"
            )
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        except _BROKEN_FILE as error:
            raise DataError(f"{path}: {name!r} cannot be read: {error}") from None
    described = _described(arrays[images_name], f"{path}: {images_name}")
    images = _levels(_channels_first(arrays[images_name], described), described)
    if labels_name is None:
        return images, None
    return images, _numbers(arrays[labels_name], len(images), f"{path}: {labels_name}")


def _headers(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each array. Raises DataError for a file that is none, or an array whose header claims more than
    follows: numpy takes the memory first."""
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(file)
                    held = member.file_size - file.tell()
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize != held:
                    raise ValueError(f"{member.filename!r} claims the shape {shape}, but has {held:,} bytes")
                headers[member.filename.removesuffix(".npy")] = dtype, shape
    except _BROKEN_FILE as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from None
    return headers


def _choose(path: Path, headers: dict[str, Any], split: str) -> tuple[str, str | None, list[str]]:
    candidates = [
        name for name in headers if (known := NAMES.get(name.lower())) and (not split or known[0] in ("", split))
    ]
    if len(candidates) != 1:
        held = ", ".join(f"{name!r} {dtype} {shape}" for name, (dtype, shape) in headers.items())
        what = "several arrays that may be the images" if candidates else "no array `images`"
        raise DataError(f"{path} has {what}{split and f' of the {split} split'}: it holds {held or 'nothing'}")
    labels = next((name for name in headers if name.lower() == NAMES[candidates[0].lower()][1]), None)
    return candidates[0], labels, [name for name in headers if name not in (candidates[0], labels)]


def _described(array: npt.NDArray[Any], name: str) -> str:
    values = array.view(np.uint8) if array.dtype == bool else array
    extent = f" with values from {values.min()} to {values.max()}" if array.size and array.dtype.kind in "biuf" else ""
    return f"{name} is {array.dtype} {array.shape}{extent}"


def _channels_first(images: npt.NDArray[Any], described: str) -> npt.NDArray[Any]:
    layouts = "[N, H, W], [N, H, W, C] or [N, C, H, W]"
    if images.ndim not in (3, 4) or images.size == 0:
        raise DataError(f"{described}: its axes are not {layouts}")
    if images.ndim == 3:
        if images.shape[2] in (1, 3, 4):
            raise DataError(f"{described}: it may be one image [H, W, C], not {layouts}")
        return images[:, None]
    if (images.shape[1] in (1, 3)) == (images.shape[3] in (1, 3)):
        raise DataError(f"{described}: which axis is the channels (1 or 3 of them) is not clear")
    return images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3) else images


def _levels(images: npt.NDArray[Any], described: str) -> Images:
    """Brightness as uint8, of 0 to 255, of floats from 0 to 1 or from -1 to 1, or of truth values.

    Raises DataError for every other scale: whole numbers up to 1 and floats up to 1/255 would all be black, floats from
    -0.5 to 0.5 are a scale of their own.
    """
    if (kind := images.dtype.kind) == "b":
        if (values := images.view(np.uint8)).max() <= 1:  # other bytes are no truth values
            return values * np.uint8(255)
    elif kind in "iuf":
        low, high = images.min(), images.max()
        if kind != "f" and low >= 0 and high <= 255 and high != 1:
            return images.astype(np.uint8, copy=False)
        if kind == "f" and low >= -TOLERANCE and high <= 1 + TOLERANCE and not 0 < high <= 1 / 255:
            return _rounded(images, 0, 255)
        if kind == "f" and -1 - TOLERANCE <= low < 0 and high <= 1 + TOLERANCE and max(-low, high) > 0.5:
            return _rounded(images, 1, 127.5)
    raise DataError(f"{described}: give integers from 0 to 255, or floats that reach from 0 to 1 or from -1 to 1")


def _rounded(images: npt.NDArray[Any], shift: float, scale: float) -> Images:
    levels = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 1024):  # a float copy of all would take four times the images' memory
        part = images[start : start + 1024].astype(np.float32)
        levels[start : start + 1024] = np.rint((part + shift) * scale).clip(0, 255)
    return levels


def _numbers(labels: npt.NDArray[Any], count: int, name: str) -> Labels:
    """Labels int64 [N] of integers [N] or [N, 1], or of one-hot rows [N, K] of any numeric type."""
    values = labels.view(np.uint8) if labels.dtype == bool else labels
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind in "iuf" and values.ndim == 2 and len(values) == count:
        if np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all():
            return np.asarray(values.argmax(axis=1), np.int64)
    elif labels.dtype.kind in "iu" and values.shape == (count,) and values.max() < 2**63:
        return values.astype(np.int64)
    raise DataError(f"{_described(labels, name)}: give {count} integers, or as many rows with a single 1 (one-hot)")
