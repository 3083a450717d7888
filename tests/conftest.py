"""Fixtures that several packages share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import Dataset, load_dataset
from pipeline.data.prepare import ShardSizes, prepare_mnist, prepare_npz
from pipeline.data.resident import load_split

REPOSITORY = Path(__file__).parent.parent
LONGEST_FIRST = (
    *("slurm/test_slurm.py", "distributed/test_trajectory.py", "distributed/test_ordinary_use.py"),
    *("distributed/test_interruptions.py", "test_configs.py", "distributed/test_chaos.py"),
    *("distributed/test_pipeline.py", "evaluation/test_controls.py", "distributed/test_network.py"),
    *("benchmarking/test_measure.py", "evaluation/test_evaluation.py", "reporting/test_record.py"),
)
"""A test process takes a whole file, the first that is left: the long ones must not be among the last."""


@pytest.hookimpl(trylast=True)  # in a random order, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def mnist_dataset() -> Dataset:
    """The real MNIST under the repository's data folder, verified; fetched and prepared if it is not there yet."""
    return prepare_mnist(REPOSITORY / "data")


@pytest.fixture(scope="session")
def digits_files(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """1,150 training and 610 test digits, scored in seconds; neither a multiple of the extractor's 100."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_split(mnist_dataset, "test")
    for split, rows in (("train", slice(0, 1150)), ("test", slice(5000, 5610))):
        np.savez(folder / f"{split}.npz", images=images[rows].numpy(), labels=labels[rows].numpy())
    return {split: folder / f"{split}.npz" for split in ("train", "test")}


@pytest.fixture
def digits(digits_files: dict[str, Path], tmp_path: Path) -> Dataset:
    """These digits as a dataset of the test's own, so nothing is cached yet."""
    return load_dataset(prepare_npz(tmp_path, "digits", digits_files, kind="mnist").folder)


@pytest.fixture(scope="session")
def scored_digits(digits_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """These digits as a dataset that tests share, with the features that evaluations cache beside it."""
    return load_dataset(prepare_npz(tmp_path_factory.mktemp("scored"), "digits", digits_files, kind="mnist").folder)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 600 random 8 x 8 images of 4 classes, in shards of 200."""
    root = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (600, 8, 8), dtype=np.uint8)
    np.savez(root / "tiny.npz", images=images, labels=np.arange(600) % 4)
    return prepare_npz(
        root, "tiny", {"train": root / "tiny.npz"}, ShardSizes(50, 200)
    ).folder  # fmt: skip
