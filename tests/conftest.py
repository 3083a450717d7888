"""Fixtures that several packages share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import Dataset
from pipeline.data.prepare import ShardSizes, prepare_mnist, prepare_npz

REPOSITORY = Path(__file__).parent.parent
LONGEST_FIRST = (
    *("slurm/test_slurm.py", "distributed/test_trajectory.py", "distributed/test_interruptions.py"),
    "distributed/test_ordinary_use.py",
    *("distributed/test_chaos.py", "distributed/test_pipeline.py", "distributed/test_two_launchers.py"),
    "distributed/test_network.py",
    *(
        "benchmarking/test_measure.py",
        "test_configs.py",
        "evaluation/test_controls.py",
        "evaluation/test_evaluation.py",
    ),
)
"""A test process takes a whole file, the first that is left: the long ones must not be among the last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def mnist_dataset() -> Dataset:
    """The real MNIST under the repository's data folder, verified; fetched and prepared if it is not there yet."""
    return prepare_mnist(REPOSITORY / "data")


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
