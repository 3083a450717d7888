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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from pipeline.errors import UserError, describe_error
from pipeline.storage.files import near

if TYPE_CHECKING:
    from pipeline.config import DataConfig

FILE_NAME, FORMAT, VERSION = "dataset.json", "image-shards", 1
MAX_VALUES = 2**26
"""The most values that one image may have: a manifest that claims more is damaged."""
KNOWN = ("mnist", "fashion_mnist", "cifar10", "stacked_mnist")
"""Names of the datasets that are prepared on first use (prepare/known.py)."""
KINDS = (*KNOWN, "own")
"""What a dataset's images may be. Feature spaces that are meant for certain images alone go by it."""
SPLITS = ("train", "test")
LABELS = ("members", "folder", "none")
"""Where the labels of single images are: in `.cls`, else in `label` or `cls` of `.json`; in the name of the folder that
an image lies in; nowhere."""

HTTP_ATTEMPTS, TIMEOUT_SECONDS = 5, 30.0

ImageShape = tuple[int, int, int]
"""Channels, height and width."""


class DataError(UserError):
    """A dataset is missing or damaged: the message names the file and what to do."""


@contextmanager
def naming(problem: str, advice: str = "") -> Iterator[None]:
    """Raises DataError "PROBLEM: ERROR ADVICE" in place of any error inside, where bytes or code of other people are
    read: what they raise has no common class. A UserError names its cause itself and passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, OSError | ValueError) and "\n" not in str(error) else ""
        raise DataError(f"{problem}: {text or describe_error(error)}{advice}") from error


def counted(count: int, noun: str) -> str:
    """Returns "1 image", "2,000 images", "0 classes"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


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
            counts.setdefault(event, []).append(f"{counted(count, kind)} (first: {first})")
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
        "format": FORMAT,
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
    folder, is_known = Path(config.root) / config.dataset, config.dataset in KNOWN
    is_in_root = (folder / FILE_NAME).exists()
    if is_known and not is_in_root:
        return None
    by_name = is_known or (is_in_root and not (Path(config.dataset) / FILE_NAME).exists())
    dataset = load_dataset(
        folder if by_name else config.dataset, allow_shell_urls=config.allow_shell_urls, root=config.root
    )
    if is_known and dataset.kind != config.dataset:
        raise DataError(
            f"{folder} holds images of kind {dataset.kind}, not {config.dataset}: name them by their path "
            f"(data.dataset {folder.absolute()}), or move them away, and {config.dataset} is prepared in their place"
        )
    return dataset


def load_dataset(folder_or_url: str | Path, *, allow_shell_urls: bool = False, root: str = "data") -> Dataset:
    """Reads and checks `dataset.json`; no shard is opened. `root` is where similar names are looked for.

    Raises DataError when the manifest is missing, damaged or of another version, and UserError when a URL in it would
    run a command and `allow_shell_urls` is false.
    """
    base = str(folder_or_url)
    location = resolve(base, FILE_NAME)
    check_allowed(location, allow_shell_urls)
    with naming(f"cannot read {location}"):
        try:
            content = read_bytes(location)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{location} does not exist{_advice(base, root)}") from None
    with naming(f"{location} cannot be used", "; prepare the dataset again"):
        dataset = _parse(json.loads(content), Path(base), base if scheme(base) else "")
    for shards in dataset.splits.values():
        for shard in shards:
            if not shard.name.isprintable():
                raise DataError(f"{location}: the shard's name {shard.name!r} holds control characters")
            check_allowed(dataset.locate(shard), allow_shell_urls, f"{location}: ")
    return dataset


def _advice(folder: str, root: str) -> str:
    """Returns the end of the message that a folder has no manifest: what to do."""
    from pipeline.data.samples import IMAGE_FILE_SUFFIXES  # here: it imports this module

    sources = {".npz": "npz", ".parquet": "parquet", ".tar": "shards", ".tgz": "shards"}
    if (file := Path(folder)).is_file() and (source := sources.get(file.suffix)):
        return f": {file} is a file; run gan-pipeline prepare {source} {file} --name NAME, then data.dataset NAME"
    if any(file.suffix.lower() in IMAGE_FILE_SUFFIXES for file in Path(folder).rglob("*")):
        return f": {folder} holds images; run gan-pipeline prepare folder {folder} --name NAME, then data.dataset NAME"
    similar = near(Path(folder)) or near(Path(root, folder))
    return f"{similar}: prepare it (gan-pipeline prepare), or give {', '.join(KNOWN)} or its folder"


def _parse(manifest: Any, folder: Path, base_url: str) -> Dataset:
    """Checks a manifest's content. Raises ValueError naming the entry that is wrong."""
    _check(manifest, {"format": str, "version": int})
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise ValueError(f"it is of version {manifest['version']} (this program reads version {VERSION})")
    _check(manifest, {"name": str, "image_shape": [int], "class_names": [str], "splits": {"train": list}})
    name, shape, class_names = manifest["name"], tuple(manifest["image_shape"]), tuple(manifest["class_names"])
    if len(shape) != 3 or math.prod(shape) > MAX_VALUES:
        raise ValueError(
            f"image_shape is {list(shape)}, not [channels, height, width] of at most {MAX_VALUES:,} values"
        )
    splits, form = {}, get_type_hints(Shard)
    for split, entries in manifest["splits"].items():
        _check(entries, [form], f"splits.{split}")
        if not entries:
            raise ValueError(f"splits.{split} lists no shard")
        splits[split] = tuple(Shard(*(entry[key] for key in form)) for entry in entries)
    # Older manifests have no kind: of those, only MNIST's are of another kind than the user's images.
    is_mnist = (name, shape, class_names) == ("mnist", (1, 28, 28), tuple("0123456789"))
    kind = manifest.get("kind", "mnist" if is_mnist else "own")
    reading = manifest.get("reading", DEFAULT_READING._asdict())
    _check(reading, get_type_hints(Reading), "reading")
    for key, value, choices in (("kind", kind, KINDS), ("reading.labels", reading["labels"], LABELS)):
        if value not in choices:
            raise ValueError(f"{key} is {value!r}, not one of {', '.join(choices)}")
    return Dataset(
        folder, name, shape, class_names, splits, base_url, kind, Reading(reading["image_key"], reading["labels"])
    )


def _check(value: Any, form: Any, what: str = "") -> None:
    """Raises ValueError unless a value of the manifest has a form: exactly a type (a truth value is no integer, and an
    integer is positive), a list of values of one form, or a dictionary with values of these forms under these keys."""
    kind, actual = form if isinstance(form, type) else type(form), type(value)
    if actual is not kind or (kind is int and value < 1):
        expected = "a positive integer" if kind is int else f"of type {kind.__name__}"
        raise ValueError(f"{what or 'its content'} is {value!r}, not {expected}")
    if isinstance(form, list):
        for index, item in enumerate(value):
            _check(item, form[0], f"{what}[{index}]")
    elif isinstance(form, dict):
        for key, part in form.items():
            entry = f"{what}.{key}" if what else key
            if key not in value:
                raise ValueError(f"{entry} is missing")
            _check(value[key], part, entry)


# -- files by path or URL ----------------------------------------------------------------------------------------------


def scheme(location: str) -> str:
    """Returns the lower-case scheme of a URL, "" for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location)
    return match[1].lower() if match else ""


def check_allowed(location: str, allow_shell_urls: bool, source: str = "") -> None:
    """Raises UserError when opening `location` would start a process and the user has not allowed that; the message
    begins with `source`, the file that names it."""
    kind = scheme(location)
    if kind in ("", "file", "http", "https"):
        return
    from webdataset.gopen import gopen_schemes

    if kind not in gopen_schemes:
        raise UserError(f"{source}{location}: nothing here opens {kind}: URLs; use a path or an http(s): URL")
    if not allow_shell_urls:
        raise UserError(
            f"{source}{location}: {kind}: URLs run a command on this machine; if you trust this dataset, "
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
        return bytes(stream.read())


def _download(url: str) -> bytes:
    for attempt in range(HTTP_ATTEMPTS):
        time.sleep(0.25 * 2**attempt if attempt else 0)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP status {error.code}"
            if error.code < 500:  # the server's answer to this request, which another attempt would not change
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
    raise OSError(f"{url}: {problem}")
