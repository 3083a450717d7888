"""A dataset on disk or behind a URL. Its manifest `dataset.json` lets every byte that training reads be verified.

webdataset opens every remote scheme by starting a program: a shell for `pipe:`, curl for `http:` and `sftp:`, gsutil
for `gs:`, and so on. Paths, `file:`, `http:` and `https:` are opened here inside the process instead; all the others
are refused unless the user allows them. webdataset imports torch, so it is imported only for such a URL.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, get_type_hints

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import DataConfig

FILE_NAME = "dataset.json"
VERSION = 1
MAX_VALUES = 2**26
"""The most values that one image may have: a manifest that claims more is damaged."""
KNOWN = ("mnist", "fashion_mnist", "cifar10", "stacked_mnist")
"""Names of the datasets that are prepared on first use (prepare/known.py)."""
KINDS = (*KNOWN, "own")
"""What a dataset's images may be. Feature spaces that are meant for certain images alone go by it."""
LABELS = ("members", "folder", "none")
"""Where the labels of single images are: in `.cls`, else in `label` or `cls` of `.json`; in the name of the folder that
an image lies in; nowhere."""

HTTP_ATTEMPTS = 5
TIMEOUT_SECONDS = 30.0

ImageShape = tuple[int, int, int]
"""Channels, height and width."""
T = TypeVar("T")


class DataError(UserError):
    """A dataset is missing or damaged: the message names the file and what to do."""


class Remarks(dict[tuple[str, str], tuple[int, str]]):
    """Counts, by kind, of what is left out of some images or read as something else, with the first of each kind."""

    def add(self, event: str, kind: str, first: object, count: int = 1) -> None:
        """Counts `count` more of a kind, a noun in the singular, for an event such as "left out"."""
        before, name = self.get((event, kind), (0, str(first)))
        self[event, kind] = before + count, name

    def __str__(self) -> str:
        """Returns, for the end of a line, "left out: 3 hard links (first: a.png), 1 hidden file (first: .b)"."""
        counts: dict[str, list[str]] = {}
        for (event, kind), (count, first) in self.items():
            counts.setdefault(event, []).append(f"{count:,} {kind}{'s' if count > 1 else ''} (first: {first})")
        return "; ".join(f"{event}: {', '.join(kinds)}" for event, kinds in counts.items())


class Reading(NamedTuple):
    """Which member of a shard's sample is its image and where its label is. It is chosen when shards are indexed."""

    image_key: str = "images.npy;png;jpg;jpeg;webp"
    """The first of these keys that a sample has, in webdataset's notation. The default is that of earlier versions."""
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
    """The content of a manifest. Only `load_dataset` reads one, and checks which URLs it may name."""

    folder: Path
    """Where dataset.json is; for a dataset behind a URL only its name, see `base_url`."""
    name: str
    image_shape: ImageShape
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
        """SHA-256 of what the dataset holds, wherever it lies: of everything in the manifest but the shards' names and
        the kind, which is only a statement about the images."""
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
        """Returns the shards of a split. Raises DataError when the dataset has no such split."""
        if split not in self.splits:
            raise DataError(f"dataset {self.name} has no {split} split: it has {', '.join(sorted(self.splits))}")
        return self.splits[split]

    def locate(self, shard: Shard) -> str:
        """Returns the path or URL of a shard."""
        return resolve(self.base_url or str(self.folder), shard.name)


def to_json(dataset: Dataset) -> dict[str, object]:
    """Returns the manifest's content."""
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


def open_dataset(config: DataConfig) -> Dataset:
    """Returns the dataset that the configuration names; a known one that is not there yet is prepared first.

    Safe in several processes at once: one prepares, the others wait for it. Raises DataError, see `existing_dataset`.
    """
    if dataset := existing_dataset(config):
        return dataset
    from pipeline.data.prepare import prepare_known

    return prepare_known(config.dataset, Path(config.root))


def existing_dataset(config: DataConfig) -> Dataset | None:
    """Reads the manifest of the dataset that the configuration names; returns None for a known one that is not there.

    Raises DataError when another is missing, when it is damaged, or when other images lie in a known one's place.
    """
    if config.dataset not in KNOWN:
        named = Path(config.root) / config.dataset
        is_named = (named / FILE_NAME).exists() and not (Path(config.dataset) / FILE_NAME).exists()
        return load_dataset(named if is_named else config.dataset, allow_shell_urls=config.allow_shell_urls)
    folder = Path(config.root) / config.dataset
    if not (folder / FILE_NAME).exists():
        return None
    dataset = load_dataset(folder, allow_shell_urls=config.allow_shell_urls)
    if dataset.kind != config.dataset:
        raise DataError(
            f"{folder} holds images of kind {dataset.kind}, not {config.dataset}: name them by their path "
            f"(data.dataset {folder.absolute()}), or move them away, and {config.dataset} is prepared in their place"
        )
    return dataset


def load_dataset(folder_or_url: str | Path, *, allow_shell_urls: bool = False) -> Dataset:
    """Reads and checks `dataset.json`; no shard is opened.

    Raises DataError when the manifest is missing, damaged or of another version, and UserError when a URL in it would
    run a command and `allow_shell_urls` is false.
    """
    base = str(folder_or_url)
    location = resolve(base, FILE_NAME)
    check_allowed(location, allow_shell_urls)
    try:
        manifest = json.loads(read_bytes(location))
        dataset = _parse(manifest, Path(base), base if scheme(base) else "")
    except FileNotFoundError:
        raise DataError(
            f"{location} does not exist: prepare it (gan-pipeline prepare), or give {', '.join(KNOWN)} or its folder"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {location}: {error}") from None
    except (ValueError, RecursionError) as error:  # JSON's, and those of `_parse`
        raise DataError(f"{location} cannot be used: {error}; prepare the dataset again") from None
    for shards in dataset.splits.values():
        for shard in shards:
            try:
                check_allowed(dataset.locate(shard), allow_shell_urls)
            except UserError as error:
                raise UserError(f"{location}: {error}") from None
    return dataset


def _parse(manifest: object, folder: Path, base_url: str) -> Dataset:
    """Checks a manifest's content. Raises ValueError naming the entry that is wrong."""
    version = _entry(manifest, "version", int)
    if _entry(manifest, "format", str) != "image-shards" or version != VERSION:
        raise ValueError(f"it is of version {version} (this program reads version {VERSION})")
    shape = tuple(_checked(side, int, "image_shape") for side in _entry(manifest, "image_shape", list))
    if len(shape) != 3 or math.prod(shape) > MAX_VALUES:
        raise ValueError(
            f"image_shape is {list(shape)}, not [channels, height, width] of at most {MAX_VALUES:,} values"
        )
    class_names = _entry(manifest, "class_names", list)
    if not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names is {class_names!r}, not a list of texts")
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, entries in _entry(manifest, "splits", dict).items():
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"splits.{split} lists no shard")
        splits[split] = tuple(_parse_shard(entry, f"splits.{split}[{index}].") for index, entry in enumerate(entries))
    if "train" not in splits:
        raise ValueError("splits.train is missing")
    name = _entry(manifest, "name", str)
    assert isinstance(manifest, dict)
    # Older manifests have no kind: of those, only MNIST's are of another kind than the user's images.
    is_mnist = (name, shape, tuple(class_names)) == ("mnist", (1, 28, 28), tuple("0123456789"))
    kind = manifest.get("kind", "mnist" if is_mnist else "own")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    reading = DEFAULT_READING
    if "reading" in manifest:
        reading = Reading(*(_entry(manifest["reading"], key, str, "reading.") for key in Reading._fields))
    if reading.labels not in LABELS:
        raise ValueError(f"reading.labels is {reading.labels!r}, not one of {', '.join(LABELS)}")
    return Dataset(folder, name, shape, tuple(class_names), splits, base_url, kind, reading)


def _parse_shard(entry: object, where: str) -> Shard:
    shard = Shard(**{key: _entry(entry, key, kind, where) for key, kind in get_type_hints(Shard).items()})
    if not shard.name.isprintable():
        raise ValueError(f"{where}name is {shard.name!r}: it holds control characters")
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"{where}sha256 is {shard.sha256!r}, not 64 hexadecimal digits")
    return shard


def _entry(mapping: object, key: str, kind: type[T], where: str = "") -> T:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where or 'its content'} is not an object")
    if key not in mapping:
        raise ValueError(f"{where}{key} is missing")
    return _checked(mapping[key], kind, f"{where}{key}")


def _checked(value: object, kind: type[T], what: str) -> T:
    """Returns a value that must be of exactly this type (a truth value is no integer) and, if an integer, positive."""
    if type(value) is not kind:
        raise ValueError(f"{what} is {value!r}, not of type {kind.__name__}")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{what} is {value!r}, not a positive integer")
    return value


# -- files by path or URL ----------------------------------------------------------------------------------------------


def scheme(location: str) -> str:
    """Returns the lower-case scheme of a URL, "" for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location)
    return match[1].lower() if match else ""


def check_allowed(location: str, allow_shell_urls: bool) -> None:
    """Raises UserError when opening `location` would start a process and the user has not allowed that."""
    kind = scheme(location)
    if kind in ("", "file", "http", "https"):
        return
    from webdataset.gopen import gopen_schemes

    if kind not in gopen_schemes:
        raise UserError(f"{location}: nothing here opens {kind}: URLs; use a path or an http(s): URL")
    if not allow_shell_urls:
        raise UserError(
            f"{location}: {kind}: URLs run a command on this machine; if you trust this dataset, "
            "allow them (training: data.allow_shell_urls true; prepare.py shards: --allow_shell_urls)"
        )


def resolve(base: str, name: str) -> str:
    """Returns where the file `name` of the folder or URL `base` is; an absolute path or a URL stands for itself."""
    if scheme(name):
        return name
    if scheme(base):
        return f"{base.rstrip('/')}/{urllib.parse.quote(name)}"
    return str(Path(base) / name)


def read_bytes(location: str) -> bytes:
    """Reads the whole content; a failing HTTP server is asked again a few times. Raises OSError."""
    kind = scheme(location)
    if kind == "":
        return Path(location).read_bytes()
    if kind == "file":
        return Path(urllib.request.url2pathname(urllib.parse.urlparse(location).path)).read_bytes()
    if kind in ("http", "https"):
        return _download(location)
    from webdataset.gopen import gopen

    with gopen(location) as stream:
        content: bytes = stream.read()
    return content


def _download(url: str) -> bytes:
    for attempt in range(HTTP_ATTEMPTS):
        if attempt:
            time.sleep(0.25 * 2**attempt)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP status {error.code}"
            if error.code < 500:  # the server's answer to this request, which another attempt would not change
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
    raise OSError(f"{url}: {problem}")
