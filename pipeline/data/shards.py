"""One shard: tar bytes <-> images.

Two kinds of members are understood. Blocks, which `prepare` writes: `KEY.images.npy` uint8 [n, C, H, W] with
`KEY.labels.npy` int64 [n], fifty times the throughput of single images. Single images, which users already have:
`KEY.png` (or another format) with `KEY.cls` or a label in `KEY.json`, see samples.py. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import tarfile
import tokenize
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import DEFAULT_READING, DataError, Dataset, ImageShape, Reading, Remarks, Shard, read_bytes
from pipeline.data.samples import BLOCK, IMAGE_FILE_SUFFIXES, NotRead, Sample, samples_in

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

BROKEN_HEADER = (SyntaxError, tokenize.TokenError)
"""What numpy raises besides ValueError for the header of an array, which is a Python literal."""


@dataclass(frozen=True)
class Samples:
    """The content of a shard, as far as it is decoded: blocks are, single images stay encoded until they are drawn, so
    that a lane's memory is about the size of a shard file."""

    images: Images | list[memoryview]
    """uint8 [n, C, H, W], or n encoded images."""
    labels: Labels | None
    """int64 [n]; None when unlabelled."""
    names: tuple[str, ...] = ()
    """The name that label i stands for in a shard whose labels are names; `read_shard` returns the dataset's numbers
    instead."""
    image_keys: frozenset[str] = frozenset()
    """The keys of the members that hold the images."""
    folders: frozenset[str] = frozenset()
    """The folders that the samples lie in, "" for none."""
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
    try:
        content = read_bytes(location)
    except OSError as error:
        raise DataError(f"cannot read shard {location} of dataset {dataset.name}: {error}") from None
    if len(content) != shard.num_bytes:
        raise _damaged(location, f"it has {len(content)} bytes, the manifest says {shard.num_bytes}")
    if verify and sha256(content).hexdigest() != shard.sha256:
        raise _damaged(location, "its SHA-256 is not the manifest's")
    # A dataset without classes leaves its shards' labels alone, whatever they are.
    reading = dataset.reading if dataset.num_classes else dataset.reading._replace(labels="none")
    samples = parse_shard(content, location, reading)
    if len(samples) != shard.num_images:
        raise _damaged(location, f"it holds {len(samples)} images, the manifest says {shard.num_images}")
    if isinstance(samples.images, np.ndarray) and samples.images.shape[1:] != dataset.image_shape:
        raise _damaged(location, f"its images are {samples.images.shape[1:]}, the manifest says {dataset.image_shape}")
    if not dataset.num_classes:
        return samples
    try:
        labels = numbered(samples, dataset.class_names)
    except DataError as error:
        raise _damaged(location, str(error)) from None
    if labels is None:
        raise _damaged(location, f"it has no labels, the manifest has {dataset.num_classes} classes")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= dataset.num_classes:
        raise _damaged(location, f"it has labels {low} to {high}, the manifest {dataset.num_classes} classes")
    return replace(samples, labels=labels, names=())


def numbered(samples: Samples, class_names: Sequence[str]) -> Labels | None:
    """Returns the labels of samples as numbers of these classes; None when unlabelled. Raises DataError for a name that
    is none of them."""
    if samples.labels is None or not samples.names:
        return samples.labels
    from pipeline.data.class_names import find_class  # here: of the shards that `prepare` writes none has names

    numbers = [find_class(name, class_names) for name in samples.names]
    if None in numbers:
        raise DataError(f"it has images of {samples.names[numbers.index(None)]!r}, which is no class of the manifest")
    return np.array(numbers, np.int64)[samples.labels]


def decode(images: Images | Sequence[memoryview], image_shape: ImageShape, location: str) -> Images:
    """Turns images of `Samples` into uint8 [n, C, H, W]; encoded ones become grey when C is 1 and RGB when C is 3.

    Raises DataError naming `location` for an image that does not decode or has another size.
    """
    if isinstance(images, np.ndarray):
        return images
    from pipeline.data.images import BROKEN_IMAGE, decode_image

    try:
        return np.stack([decode_image(io.BytesIO(content), image_shape) for content in images])
    except BROKEN_IMAGE as error:
        raise _damaged(location, str(error)) from None


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
    try:
        return _parse(content, reading)
    except NotRead as error:
        raise DataError(f"shard {location}: {error}") from None
    except (ValueError, EOFError, OSError, zlib.error, tarfile.TarError, *BROKEN_HEADER) as error:
        raise _damaged(location, str(error.args[0] if error.args else error)) from None


def _parse(content: bytes, reading: Reading) -> Samples:
    remarks, folders, keys = Remarks(), set[str](), dict[str, str]()
    blocks, block_labels = list[Images](), list[Labels]()
    encoded, labels = list[memoryview](), list[int | str]()
    imageless: list[str] = []
    for sample in samples_in(content, remarks):
        key = sample.image_key(reading.image_key)
        if key is None:
            imageless.append(sample.name)
            remarks.add("left out", "imageless sample", ", ".join(f"{sample.name}.{key}" for key in sample.members))
            continue
        if keys.setdefault(sample.name, key) != key and not reading.image_key:
            raise _scattered(sample.name)
        folders.add(sample.folder)
        if key == BLOCK:
            blocks.append(_block(sample, reading))
            if reading.labels != "none" and "labels.npy" in sample.members:
                block_labels.append(_block_labels(sample, len(blocks[-1])))
        else:
            encoded.append(sample.members[key])
            if (label := sample.label(reading.labels)) is not None:
                labels.append(label)
    if scattered := [name for name in imageless if name in keys]:
        raise _scattered(scattered[0])
    if blocks and encoded:
        raise NotRead("it mixes blocks and single images: expected one of them")
    if not blocks and not encoded:
        expected = reading.image_key or f"{', '.join(sorted(IMAGE_FILE_SUFFIXES))}, .{BLOCK}"
        raise NotRead(f"it holds no image: expected samples with one of {expected}; {remarks or 'it is empty'}")
    numbers, names = (np.concatenate(block_labels), ()) if block_labels else _numbers_and_names(labels)
    images = np.concatenate(blocks) if blocks else encoded
    if numbers is not None and len(numbers) < len(images):
        missing, besides = len(images) - len(numbers), f"; {remarks}" if remarks else ""
        raise NotRead(f"{missing} of its images have no label: --labels none leaves labels out{besides}")
    return Samples(images, numbers, names, frozenset(keys.values()), frozenset(folders), remarks)


def _scattered(name: str) -> NotRead:
    return NotRead(f"the members of its sample {name} do not follow one another: pack them again with tar --sort=name")


def _block(sample: Sample, reading: Reading) -> Images:
    block, name = _load(sample.members[BLOCK]), f"{sample.name}.{BLOCK}"
    if block.dtype != np.uint8 or block.ndim != 4:
        raise NotRead(f"{name} is {block.dtype} {block.shape}, not uint8 [n, C, H, W]")
    if reading.labels == "folder":
        raise NotRead(f"{name} is a block of images: --labels folder is for single images")
    return block.view(np.uint8)


def _block_labels(sample: Sample, count: int) -> Labels:
    labels = _load(sample.members["labels.npy"])
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise NotRead(f"the labels of {sample.name} are {labels.dtype} {labels.shape}, not {count} integers")
    return labels.astype(np.int64, copy=False)


def _numbers_and_names(labels: Sequence[int | str]) -> tuple[Labels | None, tuple[str, ...]]:
    """Returns the labels of single images as numbers, and the names that these stand for, if they are names."""
    if not labels:
        return None, ()
    names = sorted({label for label in labels if isinstance(label, str)})
    if not names:
        return np.array(labels, np.int64), ()
    if numbers := [label for label in labels if isinstance(label, int)]:
        raise NotRead(f"some of its labels are names ({names[0]!r}) and others numbers ({numbers[0]})")
    place: dict[int | str, int] = {name: number for number, name in enumerate(names)}
    return np.array([place[label] for label in labels], np.int64), tuple(names)


def _load(content: memoryview) -> npt.NDArray[np.generic]:
    """Opens an .npy file as a view of its bytes. `np.load` spends as long on one block's header as on its images."""
    length = 10 + int.from_bytes(content[8:10], "little")
    shape, fortran_order, dtype = _npy_header(bytes(content[:length]))
    if dtype.hasobject:
        raise NotRead("it holds pickled objects, which are never loaded")
    return np.frombuffer(content, dtype, offset=length).reshape(shape, order="F" if fortran_order else "C")


@lru_cache
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise NotRead("it holds an .npy member of a version other than 1.0")
    return np.lib.format.read_array_header_1_0(file)


def _damaged(location: str, reason: str) -> DataError:
    return DataError(
        f"shard {location} is damaged: {reason}; restore the file, or delete the dataset and prepare it again"
    )
