"""Replacing files so that each is the old one or the new one, whatever happens in between, a power cut included."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, whose folder is made if necessary. What the block writes there gets the
    name `path` if the block succeeds.

    Raises:
        OSError: It can't be written; the error's filename is `path`.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        yield temporary
        fsync(temporary)  # before the rename: or the name could reach the disk without the bytes
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`, which must not exist. It gets the name `path` with all that the
    block wrote there if the block succeeds, and is deleted otherwise. The folder of `path` is made if necessary."""
    make_folder(path.parent)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        (folder := Path(temporary, path.name)).mkdir()  # within it, since its own permissions are the owner's alone
        yield folder
        folder.rename(path)


def temporary_beside(path: Path) -> Path:
    """Returns a temporary name for what is to become `path`, with this process's number in it. Files of such names that
    killed processes of this machine left are removed."""
    prefix = f".{path.name}.{os.uname().nodename}."
    for other in path.parent.iterdir():
        pid = other.name.removeprefix(prefix).removesuffix(".tmp")
        if other.name == f"{prefix}{pid}.tmp" and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            other.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replaces a safetensors file atomically. The temporary file of safetensors' own `save_file` outlives a kill, its
    result is readable by its owner alone, and a full disk raises an error of another type."""
    from safetensors.torch import save  # here: a run's folder is read where torch is not

    with replacing(path) as temporary:
        temporary.write_bytes(save(dict(tensors), metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: its tensors by name, on the CPU, and the metadata of its header.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents, and waits until their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def near(path: Path) -> str:
    """Returns " (did you mean FOLDER/NAME?)", with the most similar name in the folder of a path that is not there;
    empty if none is similar."""
    beside = [] if path.exists() else [entry.name for entry in path.parent.glob("[!.]*")]
    names = get_close_matches(path.name, beside, 1)
    return "".join(f" (did you mean {path.with_name(name)}?)" for name in names)
