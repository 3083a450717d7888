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

from pipeline.data.dataset import Remarks

BLOCK = "images.npy"
"""The key of a member that holds many images, as `prepare` writes them."""
IMAGE_FILE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
}
UNPACKED_BYTES = 2**30
"""A compressed shard may unpack to this much, or to ten times its size: more is a bomb."""
OTHER_FORMATS = {
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}


class NotRead(Exception):
    """A shard is sound but holds what is not read here; the message says what that is and what was expected."""


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
                whichever image there is, and raises NotRead if there are several.
        """
        if wanted:
            return next((key for key in wanted.split(";") if key in self.members), None)
        keys = [key for key in self.members if key == BLOCK or f".{key.rpartition('.')[2]}" in IMAGE_FILE_SUFFIXES]
        if len(keys) > 1:
            raise NotRead(
                f"its sample {self.name} has {len(keys)} images, {' and '.join(keys)}: choose one, "
                f"for example by --image-key {keys[0]}"
            )
        return keys[0] if keys else None

    def label(self, labels: str) -> int | str | None:
        """Returns the label as a number or a class's name, None if there is none; `labels` is one of LABELS."""
        label: int | str | None = None
        if labels == "folder":
            if not (label := self.folder):
                raise NotRead(
                    f"its sample {self.name} lies in no folder, but --labels folder takes folders for classes"
                )
        elif labels == "members" and "cls" in self.members:
            text = bytes(self.members["cls"])
            if not re.fullmatch(rb"\s*[+-]?\d{1,18}\s*", text):
                raise NotRead(f"{self.name}.cls holds {text[:40]!r}, not an integer; --labels none leaves labels out")
            label = int(text)
        elif labels == "members" and "json" in self.members:
            label = self._label_in_json()
        if isinstance(label, str) and not (label.strip() and label.isprintable()):
            raise NotRead(f"the label of its sample {self.name} is {label[:40]!r}, which is no name")
        return label

    def _label_in_json(self) -> int | str | None:
        try:
            content = json.loads(bytes(self.members["json"]))
        except (ValueError, RecursionError) as error:
            raise NotRead(f"{self.name}.json is not JSON ({error}); --labels none leaves labels out") from None
        values = [content.get("label"), content.get("cls")] if isinstance(content, dict) else []
        label = next((value for value in values if value is not None), None)
        # A truth value is an instance of int, but no label.
        if label is None or type(label) is str or (type(label) is int and abs(label) < 2**63):
            return label
        raise NotRead(f"the label in {self.name}.json is {str(label)[:40]!r}, neither an integer nor a text")


def samples_in(content: bytes, remarks: Remarks) -> Iterator[Sample]:
    """Yields the samples of a shard, their members as views of its bytes; counts in `remarks` what is no part of one.

    Raises NotRead, or for damage tarfile.TarError and what gzip raises.
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
                    raise NotRead(f"{member.name} is stored as a sparse file: pack it again without tar's --sparse")
                start = member.offset_data
                around.append((end, content[end:start]))
                end = start + member.size
                if end > len(content):
                    raise tarfile.ReadError(f"{member.name} is cut off")
                name, key = base_plus_ext(member.name)
                if not samples or samples[-1][0] != name:
                    samples.append((name, {}))
                if samples[-1][1].setdefault(key.lower(), place := slice(start, end)) is not place:
                    raise NotRead(f"it holds {member.name} more than once")
        # tarfile takes a bad header, or a cut between two members, for the end of the archive.
        rest = content[archive.offset :]
        if len(rest) < 2 * tarfile.BLOCKSIZE or rest[: 2 * tarfile.BLOCKSIZE].strip(b"\0"):
            raise tarfile.ReadError(f"it is cut off or overwritten at byte {archive.offset}")
        if rest.strip(b"\0"):
            raise NotRead(
                f"its archive ends at byte {archive.offset}, and more follows: tars are joined by tar --concatenate, "
                "not by cat; or it is damaged there"
            )
    return _Layout(samples, left_out, [*around, (end, content[end:])], len(content))


def _opened(content: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=io.BytesIO(content), mode="r:", encoding="utf-8")
    except tarfile.ReadError:
        expected = "expected a tar, plain or packed with gzip"
        if kind := next((kind for magic, kind in OTHER_FORMATS.items() if content.startswith(magic)), None):
            raise NotRead(f"it is a {kind} file: {expected}") from None
        raise tarfile.ReadError(f"it begins with {content[:12]!r}, which is no tar's header: {expected}") from None


def _kind_left_out(member: tarfile.TarInfo) -> str:
    """Returns what kind of thing is left out, "" for folders and for members of samples."""
    if member.islnk():
        return "hard link"
    if member.issym():
        return "symbolic link"
    if member.isdir():
        return ""
    if not member.isreg():
        return "special file"
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
        raise NotRead(f"it unpacks to more than {limit:,} bytes")
    return content
