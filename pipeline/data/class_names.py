"""Names of classes: which folders are one class, the order of classes, and the class that a person asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING
from unicodedata import category, east_asian_width, normalize

import numpy as np

from pipeline.data.dataset import DataError
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.shards import Labels

NUMBER = re.compile(r"((?:^-)?\d+(?:\.\d+)?)")
SHOWN_NAMES = 20
"""The most names that an error lists."""


def spelled(name: str) -> str:
    """Returns the name as datasets store it: in Unicode's composed form (NFC), full-width and half-width characters in
    their usual width, single spaces between words and none around them."""
    usual = "".join(normalize("NFKC", char) if east_asian_width(char) in ("F", "H") else char for char in name)
    return " ".join(normalize("NFC", usual).split()) or name


@cache
def look(name: str) -> str:
    """Returns what names that look the same to a person share: their spelling without invisible characters and case. A
    name of one character keeps its case: A and a are two classes of letters."""
    visible = spelled("".join(char for char in name if category(char) != "Cf"))
    return visible if len(visible) == 1 else visible.lower()


def classes_of(folders: Iterable[str]) -> dict[str, list[str]]:
    """Groups names of folders into classes.

    Returns:
        The classes' names in their order, each with the folders that are this class, sorted as text. The first folder
        gives the name. Numbers in names count as numbers, so 10 comes after 2.
    """
    alike: dict[str, list[str]] = {}
    for folder in sorted(set(folders)):
        alike.setdefault(look(folder), []).append(folder)

    def sort_key(shared: str) -> tuple[list[str | Decimal], str]:
        # Every second part is a number, so texts are compared with texts and numbers with numbers.
        return [Decimal(part) if index % 2 else part for index, part in enumerate(NUMBER.split(shared))], shared

    return {spelled(alike[shared][0]): alike[shared] for shared in sorted(alike, key=sort_key)}


def numbered_classes(labels: Sequence[tuple[str, Labels | None]], what: str) -> tuple[str, ...]:
    """Returns the class names 0, 1, ... up to the highest label of several files, listed with their names.

    Raises DataError unless all have labels or none has, and the labels are all of 0, 1, ..., K - 1: a gap would be a
    class that no image shows.
    """
    present = [(name, np.unique(numbers)) for name, numbers in labels if numbers is not None]
    if not present:
        return ()
    if len(present) < len(labels):
        raise DataError(f"some of the {what} have labels and others have none")
    classes = np.unique(np.concatenate([numbers for _, numbers in present]))
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        name, numbers = next((name, numbers) for name, numbers in present if classes[-1] in numbers)
        raise DataError(
            f"{name} has labels from {numbers[0]} to {numbers[-1]}, but the {what} show {len(classes)} classes: "
            f"number them 0 to {len(classes) - 1}"
        )
    return tuple(map(str, range(len(classes))))


def find_class(name: str, class_names: Sequence[str]) -> int | None:
    """Returns the label of the class of exactly this name, else of the only one that looks the same, else None."""
    if name in class_names:
        return class_names.index(name)
    labels = [label for label, other in enumerate(class_names) if look(other) == look(name)]
    return labels[0] if len(labels) == 1 else None


def labels_of(folders: Sequence[str], class_names: Sequence[str]) -> Labels | None:
    """Returns the labels of images, int64 [n], by the folder of each; None without folders or if one is no class."""
    known = {folder: find_class(folder, class_names) for folder in set(folders)}
    return None if not folders or None in known.values() else np.array([known[folder] for folder in folders], np.int64)


def class_asked_for(name: str, class_names: Sequence[str], num_classes: int, source: object) -> int:
    """Returns the label that `--class` means: a class's name, or else its number from 0 on.

    Where a class has a number for its name, numbers are taken for names alone: they would mean two classes.

    Args:
        class_names: empty for a file of an earlier version, which held no names.
        source: the generator's file, for the error.

    Raises:
        UserError: there is no such class.
    """
    if not num_classes:
        raise UserError(f"--class is {name}: {source} has no classes, leave it away")
    label = find_class(name, class_names)
    named_by_numbers = any(NUMBER.fullmatch(look(other)) for other in class_names)
    if label is None and not named_by_numbers and re.fullmatch(r"\d{1,9}", name) and int(name) < num_classes:
        label = int(name)
    if label is not None:
        return label
    numbers = f"0 to {num_classes - 1}"
    if not class_names:
        raise UserError(f"--class is {name}: {source} has the classes {numbers} and does not hold their names")
    nearest = get_close_matches(look(name), map(look, class_names)) if len(class_names) > SHOWN_NAMES else []
    near = [other for other in class_names if look(other) in nearest] or class_names
    names, more = ", ".join(map(repr, near[:SHOWN_NAMES])), len(near) - SHOWN_NAMES
    raise UserError(
        f"--class is {name}: {source} has no such class, {'the nearest are' if nearest else 'it has'} {names}"
        f"{f' and {more:,} more' if more > 0 else ''}"
        f"{'' if named_by_numbers else f'; their numbers are {numbers}'}"
    )
