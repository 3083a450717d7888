"""Fixtures that several packages share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import Dataset
from pipeline.data.prepare import ShardSizes, prepare_mnist, prepare_npz

REPOSITORY = Path(__file__).parent.parent


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
