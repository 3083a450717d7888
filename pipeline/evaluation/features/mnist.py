"""`mnist`: the penultimate layer of a small digit classifier whose weights ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.evaluation.features.base import FeatureExtractor

MNIST_WEIGHTS = Path(__file__).with_name("mnist_classifier.safetensors")
MNIST_SHAPE = (1, 28, 28)


class MnistClassifier(nn.Module):
    """Convolutional digit classifier with about 455,000 parameters and 128 non-negative features.

    There is no normalisation layer: the features' scale is what cross-entropy training makes it.
    """

    num_features = 128
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(64 * 7 * 7, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, 1, 28, 28] -> features [n, 128] after the ReLU, logits [n, 10]."""
        x = images.to(self.head.weight.dtype) / 255
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        features = F.relu(self.hidden(self.dropout(x.flatten(1))))
        return features, self.head(self.dropout(features))


class MnistFeatures(FeatureExtractor):
    name = "mnist"
    num_features = MnistClassifier.num_features
    num_classes = MnistClassifier.num_classes
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, device: torch.device, image_shape: tuple[int, int, int]) -> None:
        if tuple(image_shape) != MNIST_SHAPE:
            raise UserError(
                f"the 'mnist' features score images of shape {MNIST_SHAPE}, not {tuple(image_shape)}: "
                "use evaluation.features [inception]"
            )
        weights = MNIST_WEIGHTS.read_bytes()
        super().__init__("1", weights, device)
        self.network = MnistClassifier()
        self.network.load_state_dict(load_safetensors(weights))
        self.network.eval().to(device).to(memory_format=torch.channels_last)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images)
        return features, logits
