"""The samples in a shard's bytes, by WebDataset's conventions: members of a tar whose paths are the same up to the
first dot of the base name are one sample, and the rest of a name, in lower case, is the member's key: `png`, `seg.png`.

Nothing is unpacked: a member's name is only a key, and a link holds no data.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from pipeline.data.dataset import DataError, Remarks, naming

BLOCK = "images.npy"
"""The key of a member that holds many images, as `prepare` writes them."""
IMAGE_FILE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
}
UNPACKED_BYTES = 2**30
"""A compressed shard may unpack to this much, or to ten times its size: more is a bomb."""


def checked_label(value: object, name: str) -> int | str | None:
    """Returns the label of an image: an integer of 64 bits, a name that can be shown, or None. Raises DataError naming
    the image for any other value; a truth value is an integer to Python, but no label."""
    if value is None or (type(value) is int and abs(value) < 2**63):
        return value
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise DataError(f"the label of {name} is {repr(value)[:40]}, neither an integer nor a name")


class Sample(NamedTuple):
    """The members of a tar that belong together."""

    name: str
    """Their path up to the first dot of the base name."""
    members: dict[str, memoryview]
    """Key -> content."""

    @property
    def folder(self) -> str:
        """The name of the folder that the sample lies in, "" for none."""
        folder = self.name.rpartition("/")[0].rpartition("/")[2]
        return "" if folder in (".", "..") else folder

    def image_key(self, wanted: str) -> str | None:
        """Returns the key of the sample's image, or None if it has none.

        Args:
            wanted: keys as webdataset writes them, "jpg;png": the first that the sample has is taken. "" takes
                whichever image there is, and raises DataError if there are several.
        """
        if wanted:
            return next((key for key in wanted.split(";") if key in self.members), None)
        keys = [key for key in self.members if key == BLOCK or f".{key.rpartition('.')[2]}" in IMAGE_FILE_SUFFIXES]
        if len(keys) > 1:
            raise DataError(
                f"its sample {self.name} has {len(keys)} images, {' and '.join(keys)}: choose one, "
                f"for example by --image-key {keys[0]}"
            )
        return keys[0] if keys else None

    def label(self, labels: str) -> int | str | None:
        """Returns the label as a number or a class's name, None if there is none; `labels` is one of LABELS."""
        label: object = None
        if labels == "folder":
            if not (label := self.folder):
                raise DataError(
                    f"its sample {self.name} lies in no folder, but --labels folder takes folders for classes"
                )
        elif labels == "members" and "cls" in self.members:
            label = bytes(self.members["cls"]).strip()
            if re.fullmatch(rb"[+-]?\d{1,18}", label):
                label = int(label)
        elif labels == "members" and "json" in self.members:
            with naming(f"{self.name}.json is not JSON"):
                content = json.loads(bytes(self.members["json"]))
            values = [content.get("label"), content.get("cls")] if isinstance(content, dict) else []
            label = next((value for value in values if value is not None), None)
        return checked_label(label, f"its sample {self.name}")


def samples_in(content: bytes, remarks: Remarks) -> Iterator[Sample]:
    """Yields the samples of a shard, their members as views of its bytes; counts in `remarks` what is no part of one.

    Raises DataError, without the shard's name, for what is not read here, and for damage tarfile.TarError and what gzip
    raises.
    """
    # webdataset's own reader copies through a 10 kB buffer; seeking in memory copies nothing.
    view = memoryview(content := _unpacked(content))
    layout = next((layout for layout in _LAYOUTS if layout.fits(content)), None)
    if layout is None:
        layout = _read_layout(content)
        _LAYOUTS.append(layout)
    for kind, name in layout.left_out:
        remarks.add("left out", kind, name)
    for name, members in layout.samples:
        yield Sample(name, {key: view[place] for key, place in members.items()})


class _Layout(NamedTuple):
    """Where the samples of a tar are, which holds for every tar that has the same bytes around its members' data."""

    samples: Sequence[tuple[str, dict[str, slice]]]
    """Name, and the place of each member by its key."""
    left_out: Sequence[tuple[str, str]]
    """Kind and name of what is no member of a sample."""
    around: Sequence[tuple[int, bytes]]
    """All bytes but the members' data, in runs, each with its offset."""
    size: int

    def fits(self, content: bytes) -> bool:
        return len(content) == self.size and all(content.startswith(run, start) for start, run in self.around)


_LAYOUTS: deque[_Layout] = deque(maxlen=2)
"""Of the shards read last. `prepare` gives all shards of a split but the last the same one; having tarfile read it from
each shard's headers would be a fifth of the cost of streaming."""


def _read_layout(content: bytes) -> _Layout:
    samples: list[tuple[str, dict[str, slice]]] = []
    left_out: list[tuple[str, str]] = []
    around: list[tuple[int, bytes]] = []
    end = 0
    with _opened(content) as archive:
        for member in archive:
            if kind := _kind_left_out(member):
                left_out.append((kind, member.name))
            elif member.isreg():
                if member.issparse():
                    raise DataError(f"{member.name} is stored as a sparse file: pack it again without tar's --sparse")
                start = member.offset_data
                around.append((end, content[end:start]))
                end = start + member.size
                if end > len(content):
                    raise tarfile.ReadError(f"{member.name} is cut off")
                name, key = base_plus_ext(member.name)
                if not samples or samples[-1][0] != name:
                    samples.append((name, {}))
                if samples[-1][1].setdefault(key.lower(), place := slice(start, end)) is not place:
                    raise DataError(f"it holds {member.name} more than once")
        # tarfile takes a bad header, or a cut between two members, for the end of the archive.
        rest = content[archive.offset :]
        if len(rest) < 2 * tarfile.BLOCKSIZE or rest[: 2 * tarfile.BLOCKSIZE].strip(b"\0"):
            raise tarfile.ReadError(f"it is cut off or overwritten at byte {archive.offset}")
        if rest.strip(b"\0"):
            raise DataError(
                f"its archive ends at byte {archive.offset}, and more follows: tars are joined by tar --concatenate, "
                "not by cat; or it is damaged there"
            )
    return _Layout(samples, left_out, [*around, (end, content[end:])], len(content))


def _opened(content: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=io.BytesIO(content), mode="r:", encoding="utf-8")
    except tarfile.ReadError:
        raise DataError(
            f"it begins with {content[:12]!r}, which is no tar's header: expected a tar, plain or packed with gzip"
        ) from None


def _kind_left_out(member: tarfile.TarInfo) -> str:
    """Returns what kind of thing is left out, "" for folders and for members of samples."""
    if not member.isreg():
        links = {tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link"}
        return "" if member.isdir() else links.get(member.type, "special file")
    if member.name.rpartition("/")[2].startswith("."):
        return "hidden file"
    return "" if base_plus_ext(member.name)[0] else "file without a suffix"


def _unpacked(content: bytes) -> bytes:
    if not content.startswith(b"\x1f\x8b"):
        return content
    limit = max(UNPACKED_BYTES, 10 * len(content))
    with gzip.open(io.BytesIO(content)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"it unpacks to more than {limit:,} bytes")
    return content
