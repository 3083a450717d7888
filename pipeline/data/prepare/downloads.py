"""Files that others publish: fetched with a time limit, verified, and kept until they are used."""

from __future__ import annotations

import http.client
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

from tqdm.utils import CallbackIOWrapper

from pipeline.data.manifest import DataError
from pipeline.distributed.progress import bar
from pipeline.storage.files import replacing

TIMEOUT_SECONDS = 10.0
"""Of silence, after which a server is given up."""

Fetcher = Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]
"""Names of files -> each name with its content, as far as they are had there; raises what `fetch` catches."""


def fetch(title: str, checksums: Mapping[str, str], origins: Mapping[str, Fetcher], kept: Path) -> dict[str, bytes]:
    """The files that `checksums` (name -> SHA-256) lists, from the first of `origins` that has them.

    What arrived and verifies stays in the folder `kept`, so that a killed or failed attempt does not fetch it again.
    Raises DataError with what was wrong at each origin.
    """
    kept.mkdir(exist_ok=True)
    files: dict[str, bytes] = {}
    for name, checksum in checksums.items():
        with suppress(OSError, DataError):
            files[name] = verified(name, (kept / name).read_bytes(), checksum, "")
    failures = []
    for origin, fetcher in origins.items():
        try:
            for name, content in fetcher([name for name in checksums if name not in files]):
                files[name] = verified(name, content, checksums[name], origin)
                with replacing(kept / name) as temporary:
                    temporary.write_bytes(content)
        except (DataError, OSError, http.client.HTTPException, tarfile.TarError, subprocess.SubprocessError) as error:
            failures.append(f"{origin}: {' '.join(str(error).split())}")
            continue
        if len(files) == len(checksums):
            return files
        failures.append(f"{origin}: it lacks {', '.join(name for name in checksums if name not in files)}")
    raise DataError(f"{title} could not be fetched ({'; '.join(failures)})")


def verified(name: str, content: bytes, checksum: str, origin: str) -> bytes:
    """The content of the file `name`, whose SHA-256 must be `checksum`. Raises DataError."""
    digest = sha256(content).hexdigest()
    if digest != checksum:
        raise DataError(
            f"{origin} is damaged: {name} has {len(content)} bytes and SHA-256 {digest[:12]}..., not {checksum[:12]}..."
        )
    return content


def download(url: str) -> bytes:
    """Raises OSError or HTTPException."""
    with (
        urlopen(url, timeout=TIMEOUT_SECONDS) as response,
        bar(total=response.length, desc=url.rpartition("/")[2], unit="B", unit_scale=True) as progress,
    ):
        reader = CallbackIOWrapper(progress.update, response, "read")
        return b"".join(iter(partial(reader.read, 1 << 16), b""))
