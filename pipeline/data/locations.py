"""Reading files by path or URL, and which URLs may start a process.

webdataset opens every remote scheme by starting a program: a shell for `pipe:`, curl for `http:` and `sftp:`, gsutil
for `gs:`, and so on. Paths, `file:`, `http:` and `https:` are opened here inside the process instead; all the others
are refused unless the user allows them. webdataset imports torch, so it is imported only for such a URL.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from pipeline.errors import UserError

HTTP_ATTEMPTS = 5
TIMEOUT_SECONDS = 30.0


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
