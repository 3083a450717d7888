"""The classifier that MNIST is scored with."""

from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.features.classifier import MnistFeatures


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    return MnistFeatures(torch.device("cpu"))
