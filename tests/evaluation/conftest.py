"""A few hundred real digits, scored in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import Dataset, load_dataset
from pipeline.data.prepare import prepare_npz
from pipeline.data.resident import load_split
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.features.classifier import MnistFeatures


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    return MnistFeatures(torch.device("cpu"))


@pytest.fixture(scope="session")
def digits_files(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """1,150 training and 610 test digits; neither a multiple of the extractor's 100."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_split(mnist_dataset, "test")
    for split, rows in (("train", slice(0, 1150)), ("test", slice(5000, 5610))):
        np.savez(folder / f"{split}.npz", images=images[rows].numpy(), labels=labels[rows].numpy())
    return {split: folder / f"{split}.npz" for split in ("train", "test")}


@pytest.fixture
def digits(digits_files: dict[str, Path], tmp_path: Path) -> Dataset:
    """These digits as a dataset of the test's own, so nothing is cached yet."""
    return load_dataset(prepare_npz(tmp_path, "digits", digits_files, kind="mnist").folder)
