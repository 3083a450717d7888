"""Samples in a tar by WebDataset's conventions: members whose paths are the same up to the first dot of the base name
are one sample, and the rest of a name, in lower case, is the member's key (`png`, `seg.png`, `cls`).

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
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys

from pipeline.data.folders import IMAGE_FILE_SUFFIXES
from pipeline.data.remarks import Remarks

BLOCK = "images.npy"
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
    """Content of a sound shard that is not read here; the message says what was found, and what was expected."""


def samples_of(content: bytes, location: str, remarks: Remarks) -> Iterator[dict[str, Any]]:
    """The samples of a shard, each a mapping of `__key__` to its name and of its members' keys to their bytes.

    What is no member of a sample is counted in `remarks`. Raises NotRead, or tarfile.TarError and what gzip raises for
    damage.
    """
    try:
        yield from group_by_keys(_members(content, location, remarks))
    except ValueError as error:
        name, repeated, _ = str(error.args[0]).partition(": duplicate file name")
        if not repeated:
            raise
        raise NotRead(f"it holds {name} more than once") from None


def image_key(sample: dict[str, Any], wanted: str) -> str | None:
    """The key of a sample's image, or None if it has none.

    Args:
        wanted: keys, the first of which that the sample has is taken, as webdataset writes them: "jpg;png". "" takes
            whichever image there is, and raises NotRead if there are several.
    """
    if wanted:
        return next((key for key in wanted.split(";") if key in sample), None)
    keys = [key for key in sample if key == BLOCK or f".{key.rpartition('.')[2]}" in IMAGE_FILE_SUFFIXES]
    if len(keys) > 1:
        raise NotRead(
            f"its sample {sample['__key__']} has {len(keys)} images, {' and '.join(keys)}: choose one, "
            f"for example by --image-key {keys[0]}"
        )
    return keys[0] if keys else None


def folder_of(sample: dict[str, Any]) -> str:
    """The name of the folder that a sample lies in, "" for none."""
    folder: str = sample["__key__"].rpartition("/")[0].rpartition("/")[2]
    return "" if folder in (".", "..") else folder


def label_of(sample: dict[str, Any], labels: str) -> int | str | None:
    """A sample's label as a number or a class's name, None if it has none; `labels` as in Reading."""
    key: str = sample["__key__"]
    label: int | str | None = None
    if labels == "folder":
        if not (label := folder_of(sample)):
            raise NotRead(f"its sample {key} lies in no folder, but --labels folder takes folders for classes")
    elif labels == "members" and "cls" in sample:
        text = bytes(sample["cls"])
        if not re.fullmatch(rb"\s*[+-]?\d{1,18}\s*", text):
            raise NotRead(f"{key}.cls holds {text[:40]!r}, not an integer; --labels none leaves labels out")
        label = int(text)
    elif labels == "members" and "json" in sample:
        try:
            content = json.loads(bytes(sample["json"]))
        except (ValueError, RecursionError) as error:
            raise NotRead(f"{key}.json is not JSON ({error}); --labels none leaves labels out") from None
        given = [content[name] for name in ("label", "cls") if name in content] if isinstance(content, dict) else []
        label = next((value for value in given if value is not None), None)
        if label is not None and (type(label) not in (int, str) or (isinstance(label, int) and abs(label) >= 2**63)):
            raise NotRead(f"the label in {key}.json is {str(label)[:40]!r}, neither an integer nor a text")
    if isinstance(label, str) and not (label.strip() and label.isprintable()):
        raise NotRead(f"the label of its sample {key} is {label[:40]!r}, which is no name")
    return label


def _members(content: bytes, location: str, remarks: Remarks) -> Iterator[dict[str, object]]:
    # webdataset's own reader copies through a 10 kB stream buffer; seeking in memory, members are views of the file.
    content = _unpacked(content)
    layout = next((layout for layout in _LAYOUTS if layout.fits(content)), None)
    if layout is None:
        layout = _read_layout(content)
        _LAYOUTS.append(layout)
    for kind, name in layout.left_out:
        remarks.add("left out", kind, name)
    for name, start, size in layout.members:
        yield {"fname": name, "data": memoryview(content)[start : start + size], "__url__": location}


class _Layout(NamedTuple):
    """Where the members of a tar file are: in every file that has the same bytes around its members' data."""

    members: Sequence[tuple[str, int, int]]
    """Name, offset and size of each."""
    left_out: Sequence[tuple[str, str]]
    """Kind and name of what is no member of a sample."""
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
                members.append((member.name, start, member.size))
                around.append((end, content[end:start]))
                end = start + member.size
                if end > len(content):
                    raise tarfile.ReadError(f"{member.name} is cut off")
        # tarfile takes a bad header, or a cut between two members, for the end of the archive.
        rest = content[archive.offset :]
        if len(rest) < 2 * tarfile.BLOCKSIZE or rest[: 2 * tarfile.BLOCKSIZE].strip(b"\0"):
            raise tarfile.ReadError(f"it is cut off or overwritten at byte {archive.offset}")
        if rest.strip(b"\0"):
            raise NotRead(
                f"its archive ends at byte {archive.offset}, and more follows: tars are joined by tar --concatenate, "
                "not by cat; or it is damaged there"
            )
    return _Layout(members, left_out, [*around, (end, content[end:])], len(content))


def _opened(content: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=io.BytesIO(content), mode="r:", encoding="utf-8")
    except tarfile.ReadError:
        if found := next((name for magic, name in OTHER_FORMATS.items() if content.startswith(magic)), None):
            raise NotRead(f"it is a {found} file: expected a tar, plain or packed with gzip") from None
        raise tarfile.ReadError(
            f"it begins with {content[:12]!r}, which is no tar's header: expected a tar, plain or packed with gzip"
        ) from None


def _kind_left_out(member: tarfile.TarInfo) -> str:
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
