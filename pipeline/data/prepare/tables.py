"""Whatever gives an image and a label, row by row: parquet files, the Hugging Face Hub's datasets, torch's datasets.

A row is a mapping, whose columns have names, or a tuple (image, label). Datasets are read once, from the first row to
the last, and of files nothing but the two columns. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data.dataset import SPLITS, DataError, Dataset, Remarks, naming
from pipeline.data.images import Pixels, Resizing, Row
from pipeline.data.prepare.commit import DEFAULT_SIZES, Rows, ShardSizes, check_name, write_rows
from pipeline.data.prepare.npz import TOLERANCE, channels_first
from pipeline.data.prepare.shards import expand
from pipeline.data.samples import checked_label
from pipeline.errors import UserError

COLUMNS = "image", "label"


def prepare_dataset(
    dataset: object,
    name: str,
    root: str | Path = "data",
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    columns: tuple[str, str] = COLUMNS,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
) -> Dataset:
    """Writes any dataset of Python as the dataset `root`/`name`, shuffled once. Memory does not grow with its length.

    An image is one of Pillow's, an encoded one, or an array or tensor [H, W], [H, W, C] or [C, H, W] with C 1 or 3 of
    integers from 0 to 255 or floats from 0 to 1 (what torchvision's ToTensor gives, not yet normalised). A label is an
    integer, a name or None. The classes are those of `datasets.ClassLabel` or of `classes`, as torchvision's datasets
    have it, or else the names or numbers that occur.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, a torch `Dataset`, or an iterable of rows; or a mapping of
            "train" and maybe "test" to one of these, such as a `DatasetDict`.
        sizes: Numbers of images in a member of a shard and in a shard.
        columns: Where rows that are mappings have the image and the label; the label "none" leaves labels out.
        crop, size, kind: As of `prepare_folder`.

    Raises:
        DataError: It names the row.
    """
    parts = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    named = {split: {f"the {split} split": part} for split, part in parts.items()}
    return _write(root, name, named, sizes, columns, Resizing(crop, size), kind)


def prepare_hf(
    root: Path,
    name: str,
    splits: Mapping[str, str],
    sizes: ShardSizes,
    *,
    origin: Sequence[str],
    **options: Any,
) -> Dataset:
    """Writes a dataset of the Hugging Face Hub, or a folder of its formats or of `save_to_disk`.

    Args:
        splits: The names that "train" and maybe "test" have there.
        origin: OWNER/NAME or a folder, and which of its subsets if there are several.
        options: `columns`, `resizing` and `kind`, see `prepare_dataset`.
    """
    check_name(name)
    datasets = _package("datasets")

    def load(split: str) -> Any:
        folder = Path(origin[0])
        if not any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
            # Files on this disk are read where they are, those of the Hub are kept in its cache.
            return datasets.load_dataset(*origin, split=split, streaming=folder.is_dir())
        saved = datasets.load_from_disk(folder)
        if not isinstance(saved, Mapping):
            saved = {"train": saved}
        if split not in saved:
            raise ValueError(f"it has the splits {', '.join(saved)}")
        return saved[split]

    parts = {}
    for split, theirs in splits.items():
        where = f"the split {theirs} of {' '.join(origin)}"
        with naming(f"cannot read {where}"):
            parts[split] = {where: load(theirs)}
    return _write(root, name, parts, sizes, **options)


def prepare_parquet(
    root: Path, name: str, patterns: Mapping[str, Sequence[str]], sizes: ShardSizes, **options: Any
) -> Dataset:
    """Writes the rows of parquet files whose images are encoded: bytes, or the Hub's struct of `bytes` and `path`.

    Args:
        patterns: Folders and files with * and {000..123} for "train" and maybe "test".
        options: `columns`, `resizing` and `kind`, see `prepare_dataset`.
    """
    check_name(name)
    files = {split: expand(items, ("*.parquet",)) for split, items in patterns.items()}
    parts = {split: {path: _Parquet(path, options["columns"]) for path in paths} for split, paths in files.items()}
    return _write(root, name, parts, sizes, **options)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"{name} is not installed: pip install 'gan-pipeline[datasets]'") from None


class _Parquet:
    """A parquet file as an iterable of rows, with the names of its classes if `datasets` has written it."""

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._open = partial(_package("pyarrow.parquet").ParquetFile, path)
        with naming(f"{path} cannot be read as a parquet file"), self._open() as file:
            schema, self._length = file.schema_arrow, int(file.metadata.num_rows)
            described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            kinds = described.get("info", {}).get("features", {})
            self.features = {name: SimpleNamespace(**kinds.get(name, {})) for name in schema.names}
        self._columns = [name for name in columns if name in self.features]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        with self._open() as file:
            for batch in file.iter_batches(batch_size=64, columns=self._columns):
                yield from batch.to_pylist()


def _write(
    root: str | Path,
    name: str,
    parts: Mapping[str, Mapping[str, Any]],
    sizes: ShardSizes,
    columns: tuple[str, str],
    resizing: Resizing,
    kind: str,
) -> Dataset:
    """Writes the datasets that each split has, after the names that messages give them."""
    check_name(name)
    if "train" not in parts or not parts.keys() <= {*SPLITS}:
        raise UserError(f"the dataset has the splits {', '.join(parts)}: give those that are 'train' and maybe 'test'")
    splits: dict[str, Rows] = {}
    classes: dict[tuple[str, ...] | None, str] = {}
    for split, datasets in parts.items():
        rows, counts = [], []
        for where, dataset in datasets.items():
            dataset, names = _opened(dataset, columns, where)
            classes.setdefault(names, where)
            rows.append(_rows(dataset, columns, names, where))
            counts.append(_length(dataset))
        total = None if None in counts else sum(filter(None, counts))
        splits[split] = Rows(chain.from_iterable(rows), f"the {split} split", total)
    if len(classes) > 1:
        first, other, *_ = classes.values()
        raise DataError(f"the classes of {other} are not those of {first}: all must have the same, in the same order")
    return write_rows(Path(root) / name, splits, sizes, resizing, kind, Remarks(), *classes)


def _opened(dataset: Any, columns: tuple[str, str], where: str) -> tuple[Any, tuple[str, ...] | None]:
    """Returns the dataset, made to give its images encoded if they are, and the names of its classes if it has them."""
    image, label = columns
    features, names = getattr(dataset, "features", None), getattr(dataset, "classes", None)
    if isinstance(features, Mapping):
        for option, column in zip(COLUMNS, columns, strict=True):
            if column not in features and (option, column) != ("label", "none"):
                raise DataError(
                    f"{where} has the columns {', '.join(map(repr, features))}: name that of the {option}s by "
                    f"--{option}{' (none: there are none)' if option == 'label' else ''}"
                )
        if type(features[image]).__name__ == "Image":
            dataset = dataset.cast_column(image, type(features[image])(decode=False))
        names = getattr(features.get(label), "names", None)
    if label == "none" or not names or not all(isinstance(name, str) for name in names):
        return dataset, None
    return dataset, tuple(names)


def _length(dataset: Any) -> int | None:
    with suppress(TypeError):
        return len(dataset)
    return None


def _rows(dataset: Any, columns: tuple[str, str], names: Sequence[str] | None, where: str) -> Iterator[Row]:
    # A torch dataset has a length, and beyond it raises what it likes, or nothing.
    count = None if hasattr(dataset, "__iter__") else _length(dataset)
    iterator = iter(dataset if count is None else map(dataset.__getitem__, range(count)))
    number, brightest, end = 0, 255, object()
    while True:
        name = f"row {number} of {where}"
        with naming(f"{name} cannot be read"):  # the dataset's code may be anyone's
            if (row := next(iterator, end)) is end:
                break
            if isinstance(row, Mapping):
                if missing := [column for column in columns if column != "none" and column not in row]:
                    held = ", ".join(map(repr, row))
                    raise DataError(
                        f"{name} has {held}, not {missing[0]!r}: name the two by columns=(IMAGE, LABEL or 'none')"
                    )
                image, label = row[columns[0]], None if columns[1] == "none" else row[columns[1]]
            else:
                image, label, *_ = (*row, None) if isinstance(row, tuple | list) else (row, None)
            pixels = _pixels(image, name)
        if isinstance(pixels, np.ndarray):
            brightest = max(brightest if number else 0, int(pixels.max()))
        yield Row(name, pixels, None if columns[1] == "none" else _label(label, names, name))
        number += 1
    if brightest <= 1:
        raise DataError(f"no pixel of {where} is above 1: give integers from 0 to 255, or floats from 0 to 1")
    if not number:
        raise DataError(f"{where} has no rows")


def _pixels(image: Any, name: str) -> Pixels:
    """Returns an image of a row as what `decode_image` takes."""
    if isinstance(image, Mapping):
        image = Path(image["path"]) if image["bytes"] is None else image["bytes"]
    if isinstance(image, bytes):
        return BytesIO(image)
    if isinstance(image, Image.Image | Path):
        return image
    array: npt.NDArray[Any] = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    described = f"{name}: the image is {array.dtype} {array.shape}"
    array = array[None] if array.ndim == 2 and array.size else channels_first(array[None], described)[0]
    low, high, kind = array.min(), array.max(), array.dtype.kind
    if kind == "f" and low >= -TOLERANCE and high <= 1 + TOLERANCE:
        array, low, high, kind = np.rint(array * 255).clip(0, 255), 0, 255, "u"
    if kind in "iu" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    raise DataError(
        f"{described} with values from {low} to {high}: give integers from 0 to 255, or floats from 0 to 1, not "
        "normalised"
    )


def _label(label: Any, names: Sequence[str] | None, name: str) -> int | str | None:
    value = checked_label(label.item() if hasattr(label, "item") else label, name)
    if names and not (isinstance(value, int) and 0 <= value < len(names)):
        raise DataError(
            f"the label of {name} is {value!r}, none of its classes, 0 to {len(names) - 1}: leave this split out, or "
            "the labels (--label none)"
        )
    return value
