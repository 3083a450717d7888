"""Which names are one class, the order of classes, and what `--class` means. Expected values are worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import Dataset, load_dataset
from pipeline.data.class_names import class_asked_for, classes_of
from pipeline.data.dataset import Remarks
from pipeline.data.images import Split, open_images
from pipeline.data.prepare import prepare_folder
from pipeline.data.prepare.commit import ShardSizes, commit, preparing, write_shards
from pipeline.data.resident import load_split
from pipeline.data.shards import numbered
from pipeline.errors import UserError
from tests.data.test_prepare import grey_folder, run, save, snapshot

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
"""One word in Unicode's normal forms NFC and NFD."""


def test_numbers_in_names_are_in_numeric_order() -> None:
    for names in (
        [*"0123456789", "10", "11", "100"],
        ["-10", "-2", "0", "0.25", "0.5", "1", "1.5", "cat"],
        ["3", "20", "class 2", "class 10", "class 10 b", "dog"],
        ["Ant", "bee", "Cat"],
        ["07", "7"],
    ):
        assert list(classes_of(reversed(names))) == names


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        ([COMPOSED, DECOMPOSED], COMPOSED),
        (["Cat", "cat", "CAT"], "CAT"),
        (["cat", "cat ", " cat", "cat\u00a0", "cat\u3000"], "cat"),
        (["big  cat", "big cat", "big\tcat"], "big cat"),
        (["cat", "\uff43\uff41\uff54"], "cat"),  # full-width letters
        (["2", "\uff12"], "2"),
        (["\uff76\uff9e", "\u30ac"], "\u30ac"),  # half-width katakana with its sign, and the composed letter
        (["cat", "cat\u200b", "\ufeffcat", "c\u00adat"], "cat"),  # zero-width space, byte-order mark, soft hyphen
    ],
    ids=["composed", "case", "around", "between", "full-width", "digits", "half-width", "invisible"],
)
def test_names_that_look_the_same_are_one_class(folders: list[str], name: str) -> None:
    classes = classes_of([*folders, "dog"])
    assert classes == {name: sorted(folders), "dog": ["dog"]}
    label = list(classes).index(name)
    assert numbered(folders, tuple(classes)).tolist() == [label] * len(folders)


@pytest.mark.parametrize("names", [["A", "a"], ["x\u00b2", "x2"], ["Masse", "Ma\u00dfe"], ["7", "07"], ["a-b", "a b"]])
def test_names_that_differ_to_the_eye_are_classes_of_their_own(names: list[str]) -> None:
    assert len(classes_of(names)) == 2
    assert sorted(numbered(names, names).tolist()) == [0, 1]


def test_the_names_of_a_dataset_of_before_are_taken_as_they_are() -> None:
    """Such a dataset may have two classes that look the same: exactly named, they stay two."""
    before = ("1", "10", "2", "Cat", "cat")
    assert numbered(["2", "cat", "10", "Cat"], before).tolist() == [2, 4, 1, 3]
    for names, unknown in ((["CAT"], "CAT"), (["2", "3"], "3")):
        with pytest.raises(ValueError, match=f"it has images of '{unknown}', which is no class of the dataset"):
            numbered(names, before)


DIGITS, BEFORE = tuple("0123456789"), ("0", "1", "10", "11", "2")
WORDS = ("ant", "bee", COMPOSED, "Dog", "dog")


@pytest.mark.parametrize(
    ("asked", "names", "label"),
    [
        ("7", DIGITS, 7),
        ("2", BEFORE, 4),  # sorted as text: the name, not the number
        ("10", BEFORE, 2),
        ("1", ("1", "2", "10"), 0),
        ("bee", WORDS, 1),
        ("BEE ", WORDS, 1),
        (DECOMPOSED, WORDS, 2),
        ("dog", WORDS, 4),
        ("Dog", WORDS, 3),
        ("3", WORDS, 3),  # no name is a number, so this is one
        ("2", (), 2),
    ],
)
def test_a_class_is_asked_for_by_name_or_number(asked: str, names: tuple[str, ...], label: int) -> None:
    assert class_asked_for(asked, names, len(names) or 5, "a.safetensors") == label


MANY = tuple(f"kind of thing {number}" for number in range(1000))


@pytest.mark.parametrize(
    ("asked", "names", "words"),
    [
        ("DOG", WORDS, "no such class, it has 'ant', 'bee'"),
        ("11", DIGITS, "no such class, it has '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'"),
        ("kind of things 77", MANY, "no such class, the nearest are 'kind of thing 77', 'kind of thing 877',"),
        ("5", WORDS, "no such class, it has 'ant', 'bee', 'caf\u00e9', 'Dog', 'dog'; their numbers are 0 to 4"),
        ("-1", WORDS, "no such class, it has 'ant'"),
        ("", WORDS, "no such class, it has 'ant'"),
        ("zzzz", MANY, "'kind of thing 18', 'kind of thing 19' and 980 more; their numbers are 0 to 999"),
        ("0", ("1", "2", "10"), "no such class, it has '1', '2', '10'"),  # it would be class "1"
        ("3", BEFORE, "no such class, it has '0', '1', '10', '11', '2'"),
        ("9" * 5000, WORDS, "no such class"),
        ("cat", (), "a.safetensors has the classes 0 to 4 and does not hold their names"),
        ("5", (), "a.safetensors has the classes 0 to 4 and"),
    ],
)
def test_a_class_that_is_not_there_is_refused_with_the_nearest(asked: str, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        class_asked_for(asked, names, len(names) or 5, "a.safetensors")
    message = str(caught.value)
    assert message.startswith(f"--class is {asked}: a.safetensors has ")
    assert words in message
    assert "\n" not in message


def test_classes_with_numbers_for_names_are_in_numeric_order(tmp_path: Path) -> None:
    """And the same classes are found in a test split and in images to be scored, however their folders are spelled."""
    train = grey_folder(tmp_path / "train", {"1": 1, "2": 1, "10": 1, "caf\u00e9": 1})
    test = grey_folder(tmp_path / "test", {"\uff12": 1, "10 ": 1, "1": 1, "Cafe\u0301": 1})
    dataset = prepare_folder(tmp_path, "x", {"train": train, "test": test})
    assert dataset.class_names == ("1", "2", "10", "Caf\u00e9")
    assert load_dataset(tmp_path / "x").class_names == dataset.class_names
    for split, values in (("train", [10, 10, 20, 40]), ("test", [10, 10, 30, 50])):  # ten a character of the folder
        images, labels = load_split(dataset, split)
        pixels = {label: int(image[0, 0, 0]) for label, image in zip(labels.tolist(), images, strict=True)}
        assert pixels == dict(enumerate(values))
    (test / "10 ").rename(test / "10\u200b")
    scored = open_images(test, dataset, Remarks()).labels
    assert scored is not None
    assert scored.tolist() == [0, 2, 3, 1], "in the order of the files' paths"
    (test / "1").rename(test / "one")
    assert open_images(test, dataset, Remarks()).labels is None


def test_folders_whose_names_look_the_same_are_one_class_and_that_is_said(tmp_path: Path) -> None:
    source = grey_folder(tmp_path / "in", {"caf\u00e9": 2, "cafe\u0301": 1, "tea": 1, "Tea ": 3, "A": 1, "a": 1})
    result = run("folder", source, "--name", "x", "--root", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\n'cafe\u0301', 'caf\u00e9' look the same: they are one class, 'caf\u00e9'\n" in f"\n{result.stderr}"
    assert "\n'Tea ', 'tea' look the same: they are one class, 'Tea'\n" in f"\n{result.stderr}"
    dataset = load_dataset(tmp_path / "x")
    assert dataset.class_names == ("A", "a", "caf\u00e9", "Tea")
    assert sorted(load_split(dataset, "train")[1].tolist()) == [0, 1, 2, 2, 2, 3, 3, 3, 3]


def test_a_dataset_of_before_keeps_the_order_of_its_classes(tmp_path: Path) -> None:
    """Written with classes in the order of their text, as commit ec1b328 did: its fingerprint there."""
    names = sorted(map(str, range(12)))
    source, root = tmp_path / "in", tmp_path / "data"
    for name in names:
        for copy in range(2):
            save(source / name / f"{copy}.png", np.full((8, 8), 10 * int(name) + copy))
    pixels = np.array([10 * int(name) + copy for name in names for copy in range(2)], np.uint8)
    images = np.broadcast_to(pixels[:, None, None, None], (24, 1, 8, 8))
    split = Split(24, np.arange(24) // 2, images.__getitem__)
    with preparing(root / "numbers") as temporary:
        shards = write_shards(temporary, {"train": split}, ShardSizes(), shuffle=True)
        before = commit(Dataset(root / "numbers", "numbers", (1, 8, 8), tuple(names), shards), temporary, Remarks())
    assert before.fingerprint == "4ffc0c5f095fa3d5cbe6eb05597d1510d6f4c40e6657a0a92b47b4b39f6b10d8"
    files = snapshot(before.folder)
    assert load_dataset(before.folder).class_names == tuple(names)
    assert prepare_folder(root, "numbers", {"train": source}).class_names == tuple(names)
    assert snapshot(before.folder) == files
    labels = open_images(source, before, Remarks()).labels
    assert labels is not None
    assert labels.tolist() == (np.arange(24) // 2).tolist()
    assert prepare_folder(root, "again", {"train": source}).class_names == tuple(map(str, range(12)))
