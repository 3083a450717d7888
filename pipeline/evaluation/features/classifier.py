"""A small classifier whose penultimate layer is a feature space: of digits (`mnist`), or of a dataset of one's own
(`own`). `python -m pipeline.evaluation.train_classifier` trains it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.data import Dataset
from pipeline.evaluation.features.base import FeatureExtractor

LARGEST_BASE = 8
"""Pixels a side, at most, of what the convolutions pass on."""


class Classifier(nn.Module):
    """Convolutional classifier of images (C, H, W) with 128 non-negative features.

    Convolutions of 3 x 3 with ReLU and 2 x 2 pooling until at most 8 pixels a side are left, and one more (never fewer
    than three in all): 455,000 parameters for digits. There is no normalisation layer: the features' scale is what
    cross-entropy training makes it.
    """

    num_features = 128

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.num_poolings = max(0, math.ceil(math.log2(max(height, width) / LARGEST_BASE)))
        self.num_convolutions = max(2, self.num_poolings) + 1
        for number in range(1, self.num_convolutions + 1):
            given, channels = channels, 32 if number == 1 else 64
            self.add_module(f"conv{number}", nn.Conv2d(given, channels, 3, padding=1))
        self.dropout = nn.Dropout(0.5)
        base = math.prod(math.ceil(side / 2**self.num_poolings) for side in (height, width))
        self.hidden = nn.Linear(channels * base, self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, C, H, W] -> features [n, 128] after the ReLU, logits [n, num_classes]."""
        x = images.to(self.head.weight.dtype) / 255
        for number in range(1, self.num_convolutions + 1):
            x = self.get_submodule(f"conv{number}")(x)
            x = F.max_pool2d(x, 2, ceil_mode=True) if number <= self.num_poolings else x
            x = F.relu(x)  # the same before the pooling, on four times the numbers
        features = F.relu(self.hidden(self.dropout(x.flatten(1))))
        return features, self.head(self.dropout(features))


def training_command(dataset: Dataset) -> str:
    return f"python -m pipeline.evaluation.train_classifier --dataset {dataset.folder}"


class TrainedClassifier(NamedTuple):
    """What `train_classifier` writes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """command, seed, dataset (fingerprint), test_accuracy, test_images, sha256 (of the tensors), torch."""

    @classmethod
    def read(cls, path: Path) -> TrainedClassifier:
        """Raises ValueError or OSError for a file that is no such thing."""
        try:
            with safe_open(path, framework="pt") as file:
                return cls({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(str(error)) from None


class ClassifierFeatures(FeatureExtractor):
    """The features of a trained classifier, and the classes that it knows."""

    num_features = Classifier.num_features

    def __init__(
        self,
        name: str,
        trained: TrainedClassifier,
        image_shape: tuple[int, int, int],
        class_names: tuple[str, ...],
        identity: bytes,
        device: torch.device,
    ) -> None:
        self.name, self.class_names, self.num_classes = name, class_names, len(class_names)
        self.facts = {"classifier_test_accuracy": float(trained.metadata["test_accuracy"])}
        super().__init__("1", identity, device)
        self.network = Classifier(image_shape, self.num_classes)
        self.network.load_state_dict(trained.tensors)
        self.network.eval().to(device).to(memory_format=torch.channels_last)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images)
        return features, logits
