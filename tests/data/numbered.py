"""Small datasets whose images tell which sample they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data import Dataset, load_dataset
from pipeline.data.dataset import FILE_NAME, to_json
from pipeline.data.shards import write_shard


def numbered_images(start: int, stop: int) -> npt.NDArray[np.uint8]:
    """uint8 [n, 1, 2, 2]: the four pixels are the bytes of the sample's number."""
    return np.arange(start, stop, dtype="<u4").view(np.uint8).reshape(-1, 1, 2, 2)


def image_numbers(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The inverse."""
    return np.ascontiguousarray(images).reshape(-1, 4).view("<u4")[:, 0].astype(np.int64)


def numbered_dataset(
    root: Path, counts: Sequence[int], *, name: str = "numbers", block: int = 100, labelled: bool = True
) -> Dataset:
    """Shards with the given numbers of images; the label is the sample's number modulo 10."""
    folder = root / name
    folder.mkdir()
    shards = []
    start = 0
    for index, count in enumerate(counts):
        images = numbered_images(start, start + count)
        labels = np.arange(start, start + count) % 10
        rows = [slice(at, at + block) for at in range(0, count, block)]
        blocks = [(images[row], labels[row] if labelled else None) for row in rows]
        shards.append(write_shard(folder / f"train-{index}.tar", blocks))
        start += count
    classes = tuple(map(str, range(10))) if labelled else ()
    dataset = Dataset(folder, name, (1, 2, 2), classes, {"train": tuple(shards)})
    (folder / FILE_NAME).write_text(json.dumps(to_json(dataset)))
    return load_dataset(folder)
