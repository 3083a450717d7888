"""Folders of image files as datasets: what lies in them, which classes and splits their subfolders are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from pipeline.data.class_names import classes_of, look
from pipeline.data.dataset import FILE_NAME, DataError, Dataset, Remarks, load_dataset, naming
from pipeline.data.images import Resizing, Row
from pipeline.data.prepare.commit import DEFAULT_SIZES, Rows, ShardSizes, check_name, print_line, write_rows
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
    remarks, target = Remarks(), Path(root) / name
    folders = {split: Path(path) for split, path in paths.items()}
    if list(folders) == ["train"]:
        folders = _splits_in(folders["train"], remarks)
    splits = {split: Rows(list_images(folder, remarks), str(folder)) for split, folder in folders.items()}
    return write_rows(target, splits, sizes, Resizing(crop, size), kind, remarks, _class_names(splits, target))


def list_images(folder: Path, remarks: Remarks) -> list[Row]:
    """Returns the image files below a folder, sorted by path, each labelled with the subfolder that it lies in, if
    there are any. Links are followed. Raises DataError if there is no image, or if some lie beside subfolders."""
    if not folder.is_dir():
        raise DataError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    suffixes = IMAGE_FILE_SUFFIXES & Image.registered_extensions().keys()  # not every build of Pillow has AVIF
    rows = []
    for path in _files(folder, (), remarks):
        if path.suffix.lower() in suffixes:
            label = path.relative_to(folder).parts[0] if path.parent != folder else None
            rows.append(Row(str(path), path, label))
        else:
            remarks.add("left out", "unsupported file", path)
    if not rows:
        reasons = f"; {remarks}" if remarks else ""
        raise DataError(f"{folder} holds no image file ({', '.join(sorted(suffixes))}){reasons}")
    labels = {row.label for row in rows}
    for entry in _entries(folder):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in labels:
            remarks.add("left out", "empty folder", entry)
    if None in labels and len(labels) > 1:
        raise DataError(f"{folder} holds images both beside and inside of subfolders: classes are subfolders")
    return rows


def _splits_in(folder: Path, remarks: Remarks) -> dict[str, Path]:
    """Returns the folders of "train" and "test" inside one that holds both; any other folder is all "train".

    A folder val/, valid/ or validation/ is the test split where there is no test/.
    """
    entries = _entries(folder) if folder.is_dir() else []
    inside = {entry.name.lower(): entry for entry in entries if entry.is_dir()}
    train, test = inside.get("train"), next((inside[name] for name in TEST_FOLDERS if name in inside), None)
    if train is None or test is None:
        return {"train": folder}
    for entry in entries:
        if entry not in (train, test):
            visibility = "hidden" if entry.name.startswith(".") else "further"
            remarks.add("left out", f"{visibility} {'folder' if entry.is_dir() else 'file'}", entry)
    print_line(
        f"{folder} holds {train.name}/ and {test.name}/: they are read as the splits train and test, not as classes"
    )
    return {"train": train, "test": test}


def _files(folder: Path, above: tuple[Path, ...], remarks: Remarks) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # followed, it would never end
        remarks.add("left out", "circular link", folder)
        return
    for entry in _entries(folder):
        if entry.name.startswith("."):
            remarks.add("left out", f"hidden {'folder' if entry.is_dir() else 'file'}", entry)
        elif entry.is_dir():
            yield from _files(entry, (*above, real), remarks)
        elif entry.is_file():
            yield entry
        else:
            remarks.add("left out", "dangling link" if entry.is_symlink() else "special file", entry)


def _entries(folder: Path) -> list[Path]:
    with naming("cannot read a folder"):  # the error has its path
        return sorted(folder.iterdir())


def _class_names(splits: Mapping[str, Rows], dataset: Path) -> tuple[str, ...]:
    """Returns the names of the classes, all of which every split must have. A dataset that is there already keeps its
    names and their order, so that the command that prepared it in an earlier version recognises it."""
    names = {rows.source: {str(row.label) for row in rows.rows if row.label is not None} for rows in splits.values()}
    classes = classes_of(set().union(*names.values()))
    for source, its_names in names.items():
        if missing := [name for name, alike in classes.items() if not its_names.intersection(alike)]:
            raise DataError(f"{source} has no images of the classes {missing}: every split must have all classes")
    if (dataset / FILE_NAME).exists():
        existing = load_dataset(dataset, allow_shell_urls=True).class_names
        if set(map(look, existing)) == set(map(look, classes)):
            return existing
    for name, alike in classes.items():
        if len(alike) > 1:
            print_line(f"{', '.join(map(repr, alike))} look the same: they are one class, {name!r}")
    return tuple(classes)
