"""`dataset.json`: what a dataset holds, precisely enough to verify every byte that training reads."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar, get_type_hints

from pipeline.data import locations
from pipeline.errors import UserError

FILE_NAME = "dataset.json"
VERSION = 1
MAX_VALUES = 2**26
"""Most values of one image: a manifest that claims more is damaged."""
KINDS = ("mnist", "fashion_mnist", "cifar10", "own")
"""What a dataset's images may be. Feature spaces that know only some images go by it."""

LABELS = ("members", "folder", "none")
"""Where the labels of single images are: in `.cls`, else in `label` or `cls` of `.json`; in the name of the folder that
an image lies in; nowhere."""

T = TypeVar("T")


class DataError(UserError):
    """A dataset that is missing or damaged: the message names the file and says what to do."""


class Reading(NamedTuple):
    """Which member of a sample is its image, and where its label is. It is chosen when shards are indexed."""

    image_key: str = "images.npy;png;jpg;jpeg;webp"
    """The first of these that a sample has, as webdataset writes them. The default is the order of earlier versions."""
    labels: str = "members"
    """One of LABELS."""


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class Shard:
    """One tar file of images."""

    name: str
    """Path relative to the dataset's folder, an absolute path, or a URL."""
    num_images: int
    num_bytes: int
    sha256: str
    """Hexadecimal SHA-256 of the file."""


@dataclass(frozen=True)
class Dataset:
    """The content of a manifest. Only `load_dataset` reads one, and checks what its URLs may do."""

    folder: Path
    """Where dataset.json is; for a dataset behind a URL only its name, see `base_url`."""
    name: str
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    class_names: tuple[str, ...]
    """Label i means class_names[i]; empty when unlabelled."""
    splits: dict[str, tuple[Shard, ...]] = field(hash=False)
    """"train" always, "test" maybe."""
    base_url: str = ""
    kind: str = "own"
    """One of KINDS."""
    reading: Reading = DEFAULT_READING

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the dataset holds, wherever it lies: everything in the manifest but the shards' names and
        the kind, which is said about it."""
        content = to_json(self)
        del content["kind"]
        content["splits"] = {
            split: [[shard.num_images, shard.num_bytes, shard.sha256] for shard in shards]
            for split, shards in self.splits.items()
        }
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def num_images(self, split: str) -> int:
        return sum(shard.num_images for shard in self.shards(split))

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Raises DataError when the dataset has no such split."""
        if split not in self.splits:
            raise DataError(f"dataset {self.name} has no {split} split: it has {', '.join(sorted(self.splits))}")
        return self.splits[split]

    def locate(self, shard: Shard) -> str:
        """Path or URL of a shard."""
        return locations.resolve(self.base_url or str(self.folder), shard.name)


def to_json(dataset: Dataset) -> dict[str, object]:
    """The manifest's content."""
    reading = {"reading": dataset.reading._asdict()} if dataset.reading != DEFAULT_READING else {}
    return {
        "format": "image-shards",
        "version": VERSION,
        "name": dataset.name,
        "kind": dataset.kind,
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "splits": {split: [vars(shard) for shard in shards] for split, shards in dataset.splits.items()},
        **reading,
    }


def load_dataset(folder_or_url: str | Path, *, allow_shell_urls: bool = False) -> Dataset:
    """Reads and checks `dataset.json`; no shard is opened.

    Raises DataError when the manifest is missing, damaged or of another version, and UserError when a URL in it would
    run a command and `allow_shell_urls` is false.
    """
    base = str(folder_or_url)
    location = locations.resolve(base, FILE_NAME)
    locations.check_allowed(location, allow_shell_urls)
    try:
        content = locations.read_bytes(location)
    except FileNotFoundError:
        raise DataError(
            f"{location} does not exist: prepare the dataset with pipeline/prepare.py, or give the folder that holds it"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {location}: {error}") from None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is damaged, it is not JSON ({error}): prepare the dataset again") from None
    dataset = _parse(manifest, Path(base), base if locations.scheme(base) else "", location)
    for shards in dataset.splits.values():
        for shard in shards:
            try:
                locations.check_allowed(dataset.locate(shard), allow_shell_urls)
            except UserError as error:
                raise UserError(f"{location}: {error}") from None
    return dataset


def _parse(manifest: object, folder: Path, base_url: str, location: str) -> Dataset:
    def check(value: object, kind: type[T], what: str) -> T:
        """A value of exactly this type (a truth value is no integer); integers are positive."""
        if type(value) is not kind:
            raise DataError(f"{location}: {what} is {value!r}, not of type {kind.__name__}")
        if isinstance(value, int) and value < 1:
            raise DataError(f"{location}: {what} is {value!r}, not a positive integer")
        return value

    def get(mapping: object, key: str, kind: type[T], where: str = "") -> T:
        if not isinstance(mapping, dict):
            raise DataError(f"{location}: {where or 'its content'} is not an object: prepare the dataset again")
        if key not in mapping:
            raise DataError(f"{location}: {where}{key} is missing: prepare the dataset again")
        return check(mapping[key], kind, f"{where}{key}")

    def get_shard(entry: object, where: str) -> Shard:
        shard = Shard(**{key: get(entry, key, kind, where) for key, kind in get_type_hints(Shard).items()})
        if not shard.name.isprintable():
            raise DataError(f"{location}: {where}name is {shard.name!r}: it holds control characters")
        if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            raise DataError(f"{location}: {where}sha256 is {shard.sha256!r}, not 64 hexadecimal digits")
        return shard

    version = get(manifest, "version", int)
    if get(manifest, "format", str) != "image-shards" or version != VERSION:
        raise DataError(
            f"{location} is of version {version} (this program reads version {VERSION}): prepare the dataset again"
        )
    shape = tuple(check(size, int, "image_shape") for size in get(manifest, "image_shape", list))
    if len(shape) != 3 or math.prod(shape) > MAX_VALUES:
        raise DataError(
            f"{location}: image_shape is {list(shape)}, not [channels, height, width] of at most {MAX_VALUES:,} values"
        )
    class_names = get(manifest, "class_names", list)
    if not all(isinstance(name, str) for name in class_names):
        raise DataError(f"{location}: class_names is {class_names!r}, not a list of texts")
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, entries in get(manifest, "splits", dict).items():
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{location}: splits.{split} lists no shard")
        splits[split] = tuple(get_shard(entry, f"splits.{split}[{index}].") for index, entry in enumerate(entries))
    if "train" not in splits:
        raise DataError(f"{location}: splits.train is missing: prepare the dataset again")
    name = get(manifest, "name", str)
    # Of older manifests, which do not say it, only MNIST's own are of another kind than the user's images.
    is_mnist = (name, shape, tuple(class_names)) == ("mnist", (1, 28, 28), tuple("0123456789"))
    kind = manifest.get("kind", "mnist" if is_mnist else "own")  # type: ignore[attr-defined]
    if kind not in KINDS:
        raise DataError(f"{location}: kind is {kind!r}, not one of {', '.join(KINDS)}")
    reading = DEFAULT_READING
    if "reading" in manifest:  # type: ignore[operator]
        reading = Reading(**{key: get(manifest["reading"], key, str, "reading.") for key in Reading._fields})  # type: ignore[index]
    if reading.labels not in LABELS:
        raise DataError(f"{location}: reading.labels is {reading.labels!r}, not one of {', '.join(LABELS)}")
    return Dataset(folder, name, shape, tuple(class_names), splits, base_url, kind, reading)
