"""Images and labels in .npz files as people have them: names of arrays, order of axes, scales of values.

An unambiguous file is read, every other is refused with the type, shape and range that its array has. Nothing is ever
unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import DataError, Dataset, Remarks, naming
from pipeline.data.images import Resizing, Row
from pipeline.data.prepare.commit import DEFAULT_SIZES, Rows, ShardSizes, check_name, write_rows
from pipeline.data.shards import Images, Labels

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
TOLERANCE = 1e-4
"""Floats may lie so far outside of their scale, by rounding."""


def prepare_npz(
    root: str | Path,
    name: str,
    paths: Mapping[str, str | Path],
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
) -> Dataset:
    """Writes `.npz` files as the dataset `root`/`name`, shuffled once.

    Each holds images [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3 and maybe labels, integers [N] or one-hot;
    see NAMES and `_levels` for their names and scales.

    Args:
        paths: a file for "train" and maybe "test". One that holds both (`x_train` and `x_test`) is enough.
        sizes, crop, size, kind: as of `prepare_folder`.

    Raises:
        DataError: it names the file.
    """
    check_name(name)
    files = {split: Path(path) for split, path in paths.items()}
    content = {split: load_npz(path, split) for split, path in files.items()}
    if "test" not in files and any(NAMES.get(array.lower(), ("",))[0] == "test" for array in content["train"][2]):
        files["test"] = files["train"]
        content["test"] = load_npz(files["test"], "test")
    remarks = Remarks()
    for path in dict.fromkeys(files.values()):
        unread = [content[split][2] for split in files if files[split] == path]
        for array in sorted(set.intersection(*unread)):
            remarks.add("left out", "array", f"{array!r} in {path}")
    splits = {
        split: Rows(rows_of(path, *content[split][:2]), str(path), len(content[split][0]))
        for split, path in files.items()
    }
    return write_rows(Path(root) / name, splits, sizes, Resizing(crop, size), kind, remarks)


def rows_of(path: Path, images: Images, labels: Labels | None) -> Iterator[Row]:
    """Yields the images of a file."""
    for index, image in enumerate(images):
        yield Row(f"image {index} of {path}", image, None if labels is None else int(labels[index]))


def load_npz(path: Path, split: str = "") -> tuple[Images, Labels | None, set[str]]:
    """Reads a split, "train" or "test", or with "" a file that is no split of a dataset.

    Returns:
        Images uint8 [N, C, H, W], labels int64 [N], and the names of the arrays that are neither.

    Raises:
        DataError: The file is damaged, or has no images of that split, or several; it names the file.
    """
    if path.suffix == ".npy":
        raise DataError(
            f"{path} is a single array: np.savez('FILE.npz', images=..., labels=...) writes what is read here"
        )
    advice = "; images are stored as uint8 [N, H, W, C], labels as integers [N], and no Python objects are loaded"
    with naming(f"{path} cannot be read", advice), path.open("rb") as file, np.lib.npyio.NpzFile(file) as arrays:
        candidates = [name for name in arrays.files if name.lower() in NAMES]
        if split:
            candidates = [name for name in candidates if NAMES[name.lower()][0] in ("", split)]
        if len(candidates) != 1:
            what = "several arrays that may be the images" if candidates else "no array `images`"
            content = ", ".join(map(repr, arrays.files)) or "nothing"
            raise DataError(f"{path} has {what}{split and f' of the {split} split'}: it holds {content}")
        name = candidates[0]
        labels_name = next((other for other in arrays.files if other.lower() == NAMES[name.lower()][1]), None)
        described = _described(array := arrays[name], f"{path}: {name}")
        images = _levels(channels_first(array, described), described)
        others = {*arrays.files} - {name, labels_name}
        if labels_name is None:
            return images, None, others
        return images, _numbers(arrays[labels_name], len(images), f"{path}: {labels_name}"), others


def _described(array: npt.NDArray[Any], name: str) -> str:
    values = array.view(np.uint8) if array.dtype == bool else array
    extent = f" with values from {values.min()} to {values.max()}" if array.size and array.dtype.kind in "biuf" else ""
    return f"{name} is {array.dtype} {array.shape}{extent}"


def channels_first(images: npt.NDArray[Any], described: str) -> npt.NDArray[Any]:
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
    """Returns brightness as uint8, of integers from 0 to 255, floats from 0 to 1 or from -1 to 1, or truth values.

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
    """Returns labels int64 [N] of integers [N] or [N, 1], or of one-hot rows [N, K] of any numeric type."""
    values = labels.view(np.uint8) if labels.dtype == bool else labels
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind in "iuf" and values.ndim == 2 and len(values) == count:
        if np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all():
            return np.asarray(values.argmax(axis=1), np.int64)
    elif labels.dtype.kind in "iu" and values.shape == (count,) and values.max() < 2**63:
        return values.astype(np.int64)
    raise DataError(f"{_described(labels, name)}: give {count} integers, or as many rows with a single 1 (one-hot)")
