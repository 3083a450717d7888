"""One shard: tar bytes <-> images.

Two kinds of members are understood. Blocks, which `prepare` writes: `KEY.images.npy` uint8 [n, C, H, W] with
`KEY.labels.npy` int64 [n], fifty times the throughput of single images. Single images, which users already have:
`KEY.png` (or another format) with `KEY.cls` or a label in `KEY.json`, see samples.py. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import (
    DEFAULT_READING,
    DataError,
    Dataset,
    ImageShape,
    Reading,
    Remarks,
    Shard,
    naming,
    read_bytes,
)
from pipeline.data.samples import BLOCK, IMAGE_FILE_SUFFIXES, Sample, samples_in

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """The content of a shard, as far as it is decoded: blocks are, single images stay encoded until they are drawn, so
    that a lane's memory is about the size of a shard file."""

    images: Images | list[memoryview]
    """uint8 [n, C, H, W], or n encoded images."""
    labels: npt.NDArray[Any] | None
    """int64 [n], or n names, which `read_shard` makes the dataset's numbers; None when unlabelled."""
    image_keys: frozenset[str] = frozenset()
    """The keys of the members that hold the images."""
    remarks: Remarks = field(default_factory=Remarks)
    """Counts of what the shard holds besides."""

    def __len__(self) -> int:
        return len(self.images)


def write_shard(path: Path, blocks: Iterable[tuple[Images, Labels | None]]) -> Shard:
    """Writes blocks of images; the same content gives the same bytes on any machine and day."""
    from webdataset import TarWriter

    num_images = 0
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for images, labels in blocks:
            block = {"__key__": f"{num_images:08d}", BLOCK: _npy(images)}
            if labels is not None:
                block["labels.npy"] = _npy(labels)
            writer.write(block)
            num_images += len(images)
    content = path.read_bytes()
    return Shard(path.name, num_images, len(content), sha256(content).hexdigest())


def _npy(array: Images | Labels) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_shard(dataset: Dataset, shard: Shard, *, verify: bool = True) -> Samples:
    """Reads the samples of a shard in file order.

    Raises DataError naming the shard when it cannot be read or is not what the manifest says: size, SHA-256 (only with
    `verify`, 2 ms per MB), number of images, their shape, labels outside the classes.
    """
    location = dataset.locate(shard)
    with naming(f"cannot read shard {location} of dataset {dataset.name}"):
        content = read_bytes(location)
    with _refusing_damage(location):
        if len(content) != shard.num_bytes:
            raise ValueError(f"it has {len(content)} bytes, the manifest says {shard.num_bytes}")
        if verify and sha256(content).hexdigest() != shard.sha256:
            raise ValueError("its SHA-256 is not the manifest's")
        # A dataset without classes leaves its shards' labels alone, whatever they are.
        reading = dataset.reading if dataset.num_classes else dataset.reading._replace(labels="none")
        samples = parse_shard(content, location, reading)
        if len(samples) != shard.num_images:
            raise ValueError(f"it holds {len(samples)} images, the manifest says {shard.num_images}")
        if isinstance(samples.images, np.ndarray) and samples.images.shape[1:] != dataset.image_shape:
            raise ValueError(f"its images are {samples.images.shape[1:]}, the manifest says {dataset.image_shape}")
        if not dataset.num_classes:
            return samples
        if samples.labels is None:
            raise ValueError("it has no labels, the manifest has classes")
        return replace(samples, labels=numbered(samples.labels, dataset.class_names))


def _refusing_damage(location: str) -> AbstractContextManager[None]:
    return naming(f"shard {location} is damaged", "; restore the file, or delete the dataset and prepare it again")


def numbered(labels: Sequence[int | str] | npt.NDArray[Any], class_names: Sequence[str]) -> Labels:
    """Returns labels, numbers or names, as the numbers of these classes. Raises ValueError for one that is none."""
    if isinstance(labels[0], str):
        from pipeline.data.class_names import find_class  # here: of the shards that `prepare` writes none has names

        number_of = {name: find_class(str(name), class_names) for name in set(labels)}
        if unknown := [name for name, number in number_of.items() if number is None]:
            raise ValueError(f"it has images of '{min(unknown)}', which is no class of the dataset")
        numbers = np.array([number_of[name] for name in labels], np.int64)
    else:
        numbers = np.asarray(labels, np.int64)
    if numbers.min() < 0 or numbers.max() >= len(class_names):
        raise ValueError(f"it has labels {numbers.min()} to {numbers.max()}, the dataset 0 to {len(class_names) - 1}")
    return numbers


def decode(images: Images | Sequence[memoryview], image_shape: ImageShape, location: str) -> Images:
    """Turns images of `Samples` into uint8 [n, C, H, W]; encoded ones become grey when C is 1 and RGB when C is 3.

    Raises DataError naming `location` for an image that does not decode or has another size.
    """
    if isinstance(images, np.ndarray):
        return images
    from pipeline.data.images import decode_image

    with _refusing_damage(location):
        stacked = np.stack([decode_image(io.BytesIO(content), image_shape) for content in images])
        return np.ascontiguousarray(stacked)  # `stack` keeps the order of the axes in Pillow's images


def copy_mirrored(images: Images, into: Images) -> None:
    """Copies images [..., C, H, W] into others of that shape, with H and W reversed.

    Reversing an image's bytes is reversing its words and the bytes of each: read as numbers of the other byte order,
    eight bytes at a time, which takes hardly longer than a plain copy (byte by byte it takes five times as long).
    """
    word = math.gcd(8, images.shape[-2] * images.shape[-1])
    planes = (*images.shape[:-2], -1)
    into.reshape(planes).view(f"<u{word}")[...] = images.reshape(planes).view(f">u{word}")[..., ::-1]


def parse_shard(content: bytes, location: str, reading: Reading = DEFAULT_READING) -> Samples:
    """Reads the samples in the tar bytes of any shard. Raises DataError naming `location`: that it is damaged, or which
    of its content is not read here."""
    with _refusing_damage(location):
        try:
            return _parse(content, reading)
        except DataError as error:
            raise DataError(f"shard {location}: {error}") from None


def _parse(content: bytes, reading: Reading) -> Samples:
    remarks, names, keys = Remarks(), set[str](), set[str]()
    blocks, encoded, labels = list[Images](), list[memoryview](), list[Any]()
    for sample in samples_in(content, remarks):
        if sample.name in names:
            problem = f"the members of its sample {sample.name} do not follow one another"
            raise DataError(f"{problem}: pack them again with tar --sort=name")
        names.add(sample.name)
        key = sample.image_key(reading.image_key)
        if key is None:
            remarks.add("left out", "imageless sample", ", ".join(f"{sample.name}.{key}" for key in sample.members))
            continue
        keys.add(key)
        if key == BLOCK:
            blocks.append(_block(sample, reading))
            if reading.labels != "none" and "labels.npy" in sample.members:
                labels.append(_block_labels(sample, len(blocks[-1])))
        else:
            encoded.append(sample.members[key])
            if (label := sample.label(reading.labels)) is not None:
                labels.append(label)
    if blocks and encoded:
        raise DataError("it mixes blocks and single images: expected one of them")
    if not blocks and not encoded:
        expected = reading.image_key or f"{', '.join(sorted(IMAGE_FILE_SUFFIXES))}, .{BLOCK}"
        raise DataError(f"it holds no image: expected samples with one of {expected}; {remarks or 'it is empty'}")
    if labels and len(labels) < len(blocks or encoded):
        ending = f"; {remarks}" if remarks else ""
        raise DataError(f"some of its images have no label: --labels none leaves labels out{ending}")
    if len({type(label) for label in labels}) > 1:
        raise DataError("some of its labels are names and others numbers")
    joined = (np.concatenate if blocks else np.array)(labels) if labels else None
    return Samples(np.concatenate(blocks) if blocks else encoded, joined, frozenset(keys), remarks)


def _block(sample: Sample, reading: Reading) -> Images:
    block, name = _load(sample.members[BLOCK]), f"{sample.name}.{BLOCK}"
    if block.dtype != np.uint8 or block.ndim != 4:
        raise DataError(f"{name} is {block.dtype} {block.shape}, not uint8 [n, C, H, W]")
    if reading.labels == "folder":
        raise DataError(f"{name} is a block of images: --labels folder is for single images")
    return block.view(np.uint8)


def _block_labels(sample: Sample, count: int) -> Labels:
    labels = _load(sample.members["labels.npy"])
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(f"the labels of {sample.name} are {labels.dtype} {labels.shape}, not {count} integers")
    return labels.astype(np.int64, copy=False)


def _load(content: memoryview) -> npt.NDArray[np.generic]:
    """Opens an .npy file as a view of its bytes. `np.load` spends as long on one block's header as on its images."""
    length = 10 + int.from_bytes(content[8:10], "little")
    shape, fortran_order, dtype = _npy_header(bytes(content[:length]))
    if dtype.hasobject:
        raise DataError("it holds pickled objects, which are never loaded")
    return np.frombuffer(content, dtype, offset=length).reshape(shape, order="F" if fortran_order else "C")


@lru_cache
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise DataError("it holds an .npy member of a version other than 1.0")
    return np.lib.format.read_array_header_1_0(file)
