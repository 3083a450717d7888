"""What lies in a folder of images: files, links, splits, and what is left out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from pipeline.data.manifest import DataError
from pipeline.data.remarks import Remarks

IMAGE_FILE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
}
"""Those that the installed Pillow does not read are left out: not every build of it has AVIF."""
TEST_FOLDERS = ("test", "val", "valid", "validation")


def image_files(folder: Path, remarks: Remarks) -> list[Path]:
    """The image files below a folder, sorted by path; links are followed. Raises DataError if there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    suffixes = IMAGE_FILE_SUFFIXES & Image.registered_extensions().keys()
    images = []
    for path in _files(folder, (), remarks):
        if path.suffix.lower() in suffixes:
            images.append(path)
        else:
            remarks.add("left out", "unsupported file", path)
    if not images:
        reasons = f"; {remarks}" if remarks else ""
        raise DataError(f"{folder} holds no image file ({', '.join(sorted(suffixes))}){reasons}")
    filled = {path.relative_to(folder).parts[0] for path in images}
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in filled:
            remarks.add("left out", "empty folder", entry.path)
    return images


def splits_in(folder: Path, remarks: Remarks) -> dict[str, Path]:
    """The folders of "train" and "test" inside one that holds both; any other folder is all "train".

    A folder val/, valid/ or validation/ is the test split where there is no test/.
    """
    entries = _entries(folder) if folder.is_dir() else []
    inside = {entry.name.lower(): entry.name for entry in entries if entry.is_dir()}
    test = next((inside[name] for name in TEST_FOLDERS if name in inside), None)
    if "train" not in inside or test is None:
        return {"train": folder}
    for entry in entries:
        if entry.name not in (inside["train"], test):
            visibility = "hidden" if entry.name.startswith(".") else "further"
            remarks.add("left out", f"{visibility} {'folder' if entry.is_dir() else 'file'}", entry.path)
    return {"train": folder / inside["train"], "test": folder / test}


def _files(folder: Path, above: tuple[Path, ...], remarks: Remarks) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # followed, it would never end
        remarks.add("left out", "circular link", folder)
        return
    for entry in _entries(folder):
        if entry.name.startswith("."):
            remarks.add("left out", f"hidden {'folder' if entry.is_dir() else 'file'}", entry.path)
        elif entry.is_dir():
            yield from _files(folder / entry.name, (*above, real), remarks)
        elif entry.is_file():
            yield folder / entry.name
        else:
            remarks.add("left out", "dangling link" if entry.is_symlink() else "special file", entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
