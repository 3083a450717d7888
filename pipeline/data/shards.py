"""One shard: tar bytes <-> images.

Two kinds of members are understood. Blocks, which `prepare` writes: `KEY.images.npy` uint8 [n, C, H, W] with
`KEY.labels.npy` int64 [n]; fifty times the throughput of single images. Single images, which users already have:
`KEY.png` (or .jpg, .jpeg, .webp) with `KEY.cls`. Nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import io
import math
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys

from pipeline.data import locations
from pipeline.data.images import BROKEN_HEADER, BROKEN_IMAGE, Images, ImageShape, Labels, decode_image
from pipeline.data.manifest import DataError, Dataset, Shard

UNPACKED_BYTES = 2**30
"""A compressed shard may unpack to this much, or to ten times its size: more is a bomb."""
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


@dataclass(frozen=True)
class Samples:
    """What a shard holds, as far as it is decoded: blocks are, single images stay encoded until they are drawn, so
    that a lane's memory is about the size of a shard file."""

    images: Images | list[memoryview]
    """uint8 [n, C, H, W], or n encoded images."""
    labels: Labels | None
    """int64 [n]; None when unlabelled."""

    def __len__(self) -> int:
        return len(self.images)


def write_shard(path: Path, blocks: Iterable[tuple[Images, Labels | None]]) -> Shard:
    """Writes blocks of images; the same content gives the same bytes on any machine and day."""
    num_images = 0
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for images, labels in blocks:
            block = {"__key__": f"{num_images:08d}", "images.npy": _npy(images)}
            if labels is not None:
                block["labels.npy"] = _npy(labels)
            writer.write(block)
            num_images += len(images)
    content = path.read_bytes()
    return Shard(path.name, num_images, len(content), sha256(content).hexdigest())


def read_shard(dataset: Dataset, shard: Shard, *, verify: bool = True) -> Samples:
    """The samples of a shard in file order.

    Raises DataError naming the shard when it cannot be read or is not what the manifest says: size, SHA-256 (only with
    `verify`, 2 ms per MB), number of images, their shape, labels outside the classes.
    """
    location = dataset.locate(shard)
    try:
        content = locations.read_bytes(location)
    except OSError as error:
        raise DataError(f"cannot read shard {location} of dataset {dataset.name}: {error}") from None
    if len(content) != shard.num_bytes:
        raise _damaged(location, f"it has {len(content)} bytes, the manifest says {shard.num_bytes}")
    if verify and sha256(content).hexdigest() != shard.sha256:
        raise _damaged(location, "its SHA-256 is not the manifest's")
    samples = parse_shard(content, location)
    if len(samples) != shard.num_images:
        raise _damaged(location, f"it holds {len(samples)} images, the manifest says {shard.num_images}")
    if isinstance(samples.images, np.ndarray) and samples.images.shape[1:] != dataset.image_shape:
        raise _damaged(location, f"its images are {samples.images.shape[1:]}, the manifest says {dataset.image_shape}")
    if not dataset.num_classes:
        return replace(samples, labels=None)
    if samples.labels is None:
        raise _damaged(location, f"it has no labels, the manifest has {dataset.num_classes} classes")
    low, high = samples.labels.min(), samples.labels.max()
    if low < 0 or high >= dataset.num_classes:
        raise _damaged(location, f"it has labels {low} to {high}, the manifest {dataset.num_classes} classes")
    return samples


def parse_shard(content: bytes, location: str) -> Samples:
    """The samples in the tar bytes of any shard. Raises DataError naming `location`."""
    blocks: list[Images] = []
    encoded: list[memoryview] = []
    labels: list[Labels] = []
    try:
        for sample in group_by_keys(_members(content, location)):
            key, count, label = sample["__key__"], 1, None
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
            if "images.npy" in sample:
                block = _load(sample["images.npy"])
                if block.dtype != np.uint8 or block.ndim != 4:
                    raise ValueError(f"{key}.images.npy is {block.dtype} {block.shape}, not uint8 [n, C, H, W]")
                blocks.append(block.view(np.uint8))
                count = len(block)
                label = _load(sample["labels.npy"]) if "labels.npy" in sample else None
            elif suffix is not None:
                encoded.append(sample[suffix])
                label = np.array([int(sample["cls"])]) if "cls" in sample else None
            else:
                raise ValueError(f"{key} has no image ({', '.join(IMAGE_SUFFIXES)} or images.npy)")
            if label is not None:
                if label.dtype.kind not in "iu" or label.shape != (count,):
                    raise ValueError(f"the labels of {key} are {label.dtype} {label.shape}, not {count} integers")
                labels.append(label.astype(np.int64, copy=False))
        if blocks and encoded:
            raise ValueError("it mixes blocks and single images")
        if not blocks and not encoded:
            raise ValueError("it holds no image")
        samples = Samples(np.concatenate(blocks) if blocks else encoded, np.concatenate(labels) if labels else None)
        if samples.labels is not None and len(samples.labels) < len(samples):
            raise ValueError(f"{len(samples) - len(samples.labels)} of its images have no label")
        return samples
    except (ValueError, EOFError, OSError, zlib.error, tarfile.TarError, *BROKEN_HEADER) as error:
        raise _damaged(location, str(error.args[0] if error.args else error)) from None


def decode(images: Images | Sequence[memoryview], image_shape: ImageShape, location: str) -> Images:
    """Images of `Samples` -> uint8 [n, C, H, W]; encoded ones become grey when C is 1 and RGB when C is 3.

    Raises DataError naming `location` for an image that does not decode or has another size.
    """
    if isinstance(images, np.ndarray):
        return images
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


def _members(content: bytes, location: str) -> Iterator[dict[str, object]]:
    # webdataset's own reader copies through a 10 kB stream buffer; seeking in memory, members are views of the file.
    if content.startswith(b"\x1f\x8b"):
        limit = max(UNPACKED_BYTES, 10 * len(content))
        with gzip.open(io.BytesIO(content)) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"it unpacks to more than {limit:,} bytes")
    layout = next((layout for layout in _LAYOUTS if layout.fits(content)), None)
    if layout is None:
        layout = _read_layout(content)
        _LAYOUTS.append(layout)
    for name, start, size in layout.members:
        yield {"fname": name, "data": memoryview(content)[start : start + size], "__url__": location}


class _Layout(NamedTuple):
    """Where the members of a tar file are: in every file that has the same bytes around its members' data."""

    members: Sequence[tuple[str, int, int]]
    """Name, offset and size of each."""
    around: Sequence[tuple[int, bytes]]
    """All bytes but the members' data, each run of them with its offset."""
    size: int

    def fits(self, content: bytes) -> bool:
        return len(content) == self.size and all(content.startswith(run, start) for start, run in self.around)


_LAYOUTS: deque[_Layout] = deque(maxlen=2)
"""Of the last shards. `prepare` gives all shards of a split but the last the same one; for tarfile to find it in each
shard's headers would be a fifth of the cost of streaming."""


def _read_layout(content: bytes) -> _Layout:
    members: list[tuple[str, int, int]] = []
    around: list[tuple[int, bytes]] = []
    end = 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            if member.isreg():
                start = member.offset_data
                members.append((member.name, start, member.size))
                around.append((end, content[end:start]))
                end = start + member.size
                if end > len(content):
                    raise tarfile.ReadError(f"{member.name} is cut off")
        # tarfile takes a bad header, or a cut between two members, for the end of the archive.
        rest = content[archive.offset :]
        if len(rest) < 2 * tarfile.BLOCKSIZE or rest.strip(b"\0"):
            raise tarfile.ReadError(f"it is cut off or overwritten at byte {archive.offset}")
    return _Layout(members, [*around, (end, content[end:])], len(content))


def _npy(array: Images | Labels) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _load(content: memoryview) -> npt.NDArray[np.generic]:
    """An .npy file as a view of its bytes. `np.load` spends as long on one block's header as on its images."""
    length = 10 + int.from_bytes(content[8:10], "little")
    shape, fortran_order, dtype = _npy_header(bytes(content[:length]))
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    return np.frombuffer(content, dtype, offset=length).reshape(shape, order="F" if fortran_order else "C")


@lru_cache
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it holds an .npy member of a version other than 1.0")
    return np.lib.format.read_array_header_1_0(file)


def _damaged(location: str, reason: str) -> DataError:
    return DataError(
        f"shard {location} is damaged: {reason}; restore the file, or delete the dataset and prepare it again"
    )
