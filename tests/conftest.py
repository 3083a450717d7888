"""Fixtures that several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data import Dataset
from pipeline.data.preparing import prepare_mnist

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def mnist_dataset() -> Dataset:
    """The real MNIST under the repository's data folder, verified; fetched and prepared if it is not there yet."""
    return prepare_mnist(REPOSITORY / "data")
