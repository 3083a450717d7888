"""Folders of image files as datasets: what lies in them, which classes and splits their subfolders are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from pipeline.data.class_names import classes_of, labels_of, look
from pipeline.data.dataset import FILE_NAME, DataError, Dataset, Remarks, load_dataset
from pipeline.data.images import Resizing
from pipeline.data.prepare.commit import (
    DEFAULT_SIZES,
    Row,
    Rows,
    ShardSizes,
    check_name,
    print_line,
    write_rows,
)
from pipeline.data.samples import IMAGE_FILE_SUFFIXES

TEST_FOLDERS = ("test", "val", "valid", "validation")


def prepare_folder(
    root: str | Path,
    name: str,
    paths: Mapping[str, str | Path],
    sizes: ShardSizes = DEFAULT_SIZES,
    *,
    crop: int | None = None,
    size: int | None = None,
    kind: str = "own",
) -> Dataset:
    """Writes image files as the dataset `root`/`name`, shuffled once: a folder is sorted by class, a shard must not be.

    Images become grey if all are, otherwise RGB. Subfolders are the classes, without any the images are unlabelled;
    subfolders whose names look the same are one class (class_names.py).

    Args:
        paths: a folder for "train" and maybe "test". A single folder that holds train/ and test/ (or val/) is both.
        sizes: numbers of images in a member of a shard and in a shard.
        crop: side in pixels of the centre square that is cut out of each image first.
        size: side in pixels that images are then resized to, after they are cropped to their centre square.
        kind: what the images are, one of KINDS: feature spaces go by it.

    Raises:
        DataError: images do not decode, are smaller than `crop`, or differ in size without either; it names the file.
    """
    check_name(name)
    remarks, resizing, target = Remarks(), Resizing(crop, size), Path(root) / name
    if list(paths) == ["train"] and len(inside := _splits_in(Path(paths["train"]), remarks)) == 2:
        named = " and ".join(f"{path.name}/" for path in inside.values())
        print_line(f"{paths['train']} holds {named}: they are read as the splits train and test, not as classes")
        paths = inside
    listings = {split: list_images(Path(path), remarks) for split, path in paths.items()}
    class_names = _class_names({Path(paths[split]): folders for split, (_, folders) in listings.items()}, target)
    rows = {split: Rows(_rows(*listing, class_names), len(listing[0])) for split, listing in listings.items()}
    return write_rows(target, rows, sizes, resizing, kind, remarks, class_names)


def _rows(files: Sequence[Path], folders: Sequence[str], class_names: Sequence[str]) -> Iterator[Row]:
    labels = labels_of(folders, class_names)
    for index, file in enumerate(files):
        yield Row(str(file), file, None if labels is None else int(labels[index]))


def list_images(folder: Path, remarks: Remarks) -> tuple[list[Path], list[str]]:
    """Returns the image files below a folder, sorted by path, and the subfolder of each, which is its class; of
    unlabelled images none. Links are followed. Raises DataError if there is no image, or if some have no class."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    suffixes = IMAGE_FILE_SUFFIXES & Image.registered_extensions().keys()  # not every build of Pillow has AVIF
    images = []
    for path in _files(folder, (), remarks):
        if path.suffix.lower() in suffixes:
            images.append(path)
        else:
            remarks.add("left out", "unsupported file", path)
    if not images:
        reasons = f"; {remarks}" if remarks else ""
        raise DataError(f"{folder} holds no image file ({', '.join(sorted(suffixes))}){reasons}")
    parents = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in images]
    filled = set(parents)
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in filled:
            remarks.add("left out", "empty folder", entry.path)
    if "" in parents and any(parents):
        raise DataError(f"{folder} holds images both beside and inside of subfolders: classes are subfolders")
    return images, parents if any(parents) else []


def _splits_in(folder: Path, remarks: Remarks) -> dict[str, Path]:
    """Returns the folders of "train" and "test" inside one that holds both; any other folder is all "train".

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


def _class_names(folders: dict[Path, list[str]], dataset: Path) -> tuple[str, ...]:
    """Returns the names of the classes, all of which every split must have. A dataset that is there already keeps its
    names and their order, so that the command that prepared it in an earlier version recognises it.

    Args:
        folders: the subfolders of the images in each split's folder.
        dataset: the dataset's folder.
    """
    classes = classes_of(name for names in folders.values() for name in names)
    for path, names in folders.items():
        if missing := [name for name, alike in classes.items() if not set(alike) & set(names)]:
            raise DataError(f"{path} has no images of the classes {missing}: every split must have all classes")
    if (dataset / FILE_NAME).exists():
        existing = load_dataset(dataset, allow_shell_urls=True).class_names
        if set(map(look, existing)) == set(map(look, classes)):
            return existing
    for name, alike in classes.items():
        if len(alike) > 1:
            print_line(f"{', '.join(map(repr, alike))} look the same: they are one class, {name!r}")
    return tuple(classes)
