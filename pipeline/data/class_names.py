"""Names of classes: which folders are one class, the order of classes, and the class that a person asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from unicodedata import category, east_asian_width, normalize

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

NUMBER = re.compile(r"((?:^-)?\d+(?:\.\d+)?)")
SHOWN_NAMES = 20
"""Most names that an error lists."""


def spelled(name: str) -> str:
    """The name as datasets store it: Unicode's composed form (NFC), full-width and half-width characters in their
    usual width, single spaces between words and none around them."""
    usual = "".join(normalize("NFKC", each) if east_asian_width(each) in ("F", "H") else each for each in name)
    return " ".join(normalize("NFC", usual).split()) or name


@cache
def look(name: str) -> str:
    """What names that look the same to a person have in common: their spelling without invisible characters and
    without case. A name of one character keeps its case: A and a are two classes of letters."""
    visible = spelled("".join(each for each in name if category(each) != "Cf"))
    return visible if len(visible) == 1 else visible.lower()


def classes_of(folders: Iterable[str]) -> dict[str, list[str]]:
    """Groups names of folders into classes.

    Returns:
        The classes' names in their order, each with the folders that are this class, in the order of their text. The
        first of these gives the name. Numbers in names count as numbers, so 10 comes after 2.
    """
    alike: dict[str, list[str]] = {}
    for folder in sorted(set(folders)):
        alike.setdefault(look(folder), []).append(folder)

    def place(shared: str) -> tuple[list[str | Decimal], str]:
        # Every second part is a number, so texts meet texts and numbers meet numbers.
        return [Decimal(part) if index % 2 else part for index, part in enumerate(NUMBER.split(shared))], shared

    return {spelled(alike[shared][0]): alike[shared] for shared in sorted(alike, key=place)}


def find_class(name: str, class_names: Sequence[str]) -> int | None:
    """The label of the class of exactly this name, else of the only one that looks the same; None if there is none."""
    if name in class_names:
        return class_names.index(name)
    labels = [label for label, other in enumerate(class_names) if look(other) == look(name)]
    return labels[0] if len(labels) == 1 else None


def labels_of(folders: Sequence[str], class_names: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """The labels of images, int64 [n], by the folder of each; None without folders or where one is no class."""
    known = {folder: find_class(folder, class_names) for folder in set(folders)}
    return None if not folders or None in known.values() else np.array([known[folder] for folder in folders], np.int64)


def class_asked_for(asked: str, class_names: Sequence[str], num_classes: int, source: object) -> int:
    """The label that `--class` means: a class's name, or else its number from 0 on.

    Where a name is itself a number, numbers are names alone: they would mean two classes.

    Args:
        class_names: empty for a file of before files had names, whose classes have numbers alone.
        source: the generator's file, for the error.

    Raises:
        UserError: there is no such class.
    """
    if not num_classes:
        raise UserError(f"--class is {asked}: {source} has no classes, leave it away")
    label = find_class(asked, class_names)
    named_by_numbers = any(NUMBER.fullmatch(look(name)) for name in class_names)
    if label is None and not named_by_numbers and re.fullmatch(r"\d{1,9}", asked) and int(asked) < num_classes:
        label = int(asked)
    if label is not None:
        return label
    numbers = f"0 to {num_classes - 1}"
    if not class_names:
        raise UserError(f"--class is {asked}: {source} has the classes {numbers} and does not hold their names")
    nearest = get_close_matches(look(asked), map(look, class_names))
    near = [name for name in class_names if look(name) in nearest] or class_names
    names, more = ", ".join(map(repr, near[:SHOWN_NAMES])), len(near) - SHOWN_NAMES
    raise UserError(
        f"--class is {asked}: {source} has no such class, {'the nearest are' if nearest else 'it has'} {names}"
        f"{f' and {more:,} more' if more > 0 else ''}"
        f"{'' if named_by_numbers else f'; their numbers are {numbers}'}"
    )
