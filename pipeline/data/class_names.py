"""Names of classes: which folders are one class, the order of classes, and the class that a person asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from unicodedata import category, east_asian_width, normalize

from pipeline.data.dataset import SPLITS, DataError
from pipeline.errors import UserError

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


def classes_of_labels(sources: Sequence[tuple[str, str, Set[int | str | None]]]) -> tuple[str, ...]:
    """Returns the class names that labels tell: the names that they are, of those that look the same one, or their
    numbers, from 0 up to the highest; none of unlabelled images.

    Args:
        sources: The split, the name and the distinct labels of each source of images.

    Raises:
        DataError: Sources are not labelled in one way; a class is only in the test split; or numbers are not all of 0,
            1, ..., K - 1: a gap would be a class that no image shows. It names the source.
    """
    ways: dict[type, str] = {}
    for _, source, labels in sources:
        ways.setdefault(type(next(iter(labels), None)), source)
    if len(ways) > 1:
        words = {int: "numbers as labels", str: "names as labels"}
        one, other, *_ = (f"{source} has {words.get(kind, 'no labels')}" for kind, source in ways.items())
        raise DataError(f"{one}, but {other}: label all images in one way")
    train, test = ({label for name, _, labels in sources if name == split for label in labels} for split in SPLITS)
    if str in ways:
        classes = tuple(classes_of(map(str, train)))
        if untrained := sorted(name for name in map(str, test) if find_class(name, classes) is None):
            raise DataError(f"the test images show {untrained[0]!r}, the training images do not")
        return classes
    numbers, untrained_numbers = (
        sorted(label for label in each if isinstance(label, int)) for each in (train, test - train)
    )
    if numbers != list(range(len(numbers))):
        source = next(source for _, source, labels in sources if numbers[-1] in labels)
        raise DataError(
            f"{source}: the labels, from {numbers[0]} to {numbers[-1]}, do not begin at 0 or leave numbers out: number "
            f"the classes 0 to {len(numbers) - 1}"
        )
    if untrained_numbers:
        raise DataError(f"the test images show class {untrained_numbers[0]}, the training images do not")
    return tuple(map(str, numbers))


def find_class(name: str, class_names: Sequence[str]) -> int | None:
    """Returns the label of the class of exactly this name, else of the only one that looks the same, else None."""
    if name in class_names:
        return class_names.index(name)
    labels = [label for label, other in enumerate(class_names) if look(other) == look(name)]
    return labels[0] if len(labels) == 1 else None


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
        raise UserError(
            f"--class is {name}: {source} has no classes, leave it away (classes are learnt with --config "
            "quickstart, or --training.objective crpgan, acgan or acwgan)"
        )
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
