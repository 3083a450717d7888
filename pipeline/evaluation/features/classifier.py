"""`mnist` and `own`: the penultimate layer of a small classifier, of digits or of the classes of any labelled dataset.

The weights for digits ship with the package; `gan-pipeline train-classifier` trains others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, digest_of
from pipeline.storage.files import read_tensors

LARGEST_BASE = 8  # pixels of the longer side of the convolutions' output
MNIST_WEIGHTS = Path(__file__).with_name("mnist_classifier.safetensors")
MNIST_SHAPE = (1, 28, 28)
CHANNELS = {"mnist": 1, "stacked_mnist": 3}
"""How many channels images of the kinds of datasets with a digit in each channel have."""
OTHERS = "[inception], [dinov2] (both are downloaded) or [module:NAME], a network of yours"


class Classifier(nn.Module):
    """Convolutional classifier of images (C, H, W) with 128 non-negative features.

    Convolutions of 3 x 3 with ReLU and 2 x 2 pooling until at most 8 pixels a side are left, and one more (at least
    three in all): 455,000 parameters for digits. There is no normalisation layer, so the scale of the features is what
    training with cross-entropy makes it.
    """

    num_features = 128

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.num_poolings = max(0, math.ceil(math.log2(max(height, width) / LARGEST_BASE)))
        self.num_convolutions = max(2, self.num_poolings) + 1
        for number in range(1, self.num_convolutions + 1):
            inputs, channels = channels, 32 if number == 1 else 64
            self.add_module(f"conv{number}", nn.Conv2d(inputs, channels, 3, padding=1))
        self.dropout = nn.Dropout(0.5)
        base = math.prod(math.ceil(side / 2**self.num_poolings) for side in (height, width))
        self.hidden = nn.Linear(channels * base, self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features [n, 128] after the ReLU and logits [n, num_classes] of images uint8 [n, C, H, W]."""
        x = images.to(self.head.weight.dtype) / 255
        for number in range(1, self.num_convolutions + 1):
            x = self.get_submodule(f"conv{number}")(x)
            x = F.max_pool2d(x, 2, ceil_mode=True) if number <= self.num_poolings else x
            x = F.relu(x)  # before the pooling it would give the same at four times the cost
        features = F.relu(self.hidden(self.dropout(x.flatten(1))))
        return features, self.head(self.dropout(features))


class ClassifierFeatures(FeatureExtractor):
    """The features of a trained classifier and the classes that it tells apart, `class_names`.

    Args:
        tensors, metadata: The content of a file that `train_classifier` wrote.
        identity: The bytes that the fingerprint stands for.
    """

    name = "own"
    num_features = Classifier.num_features

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        image_shape: tuple[int, int, int],
        class_names: tuple[str, ...],
        identity: bytes,
        device: torch.device,
    ) -> None:
        self.class_names, self.num_classes = class_names, len(class_names)
        self.facts = {"classifier_test_accuracy": (accuracy := float(metadata["test_accuracy"]))}
        self.warning = near_chance(accuracy, self.num_classes, metadata.get("command", ""))
        super().__init__("1", identity, device)
        self.network = Classifier(image_shape, self.num_classes)
        self.network.load_state_dict(tensors)
        self.network.eval().to(device).to(memory_format=torch.channels_last)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images)
        return features, logits


class MnistFeatures(ClassifierFeatures):
    """The classifier of digits that ships with the package, on each of the `channels` of an image.

    Features are those of all channels side by side. A class is the number that the digits form, the first its highest.
    Its logit is the sum of theirs, and softmax makes of it the product of their probabilities.
    """

    name = "mnist"

    def __init__(self, device: torch.device, channels: int = 1) -> None:
        content, digits = MNIST_WEIGHTS.read_bytes(), tuple("0123456789")
        super().__init__(*read_tensors(MNIST_WEIGHTS), MNIST_SHAPE, digits, content, device)
        self.num_features, self.num_classes = channels * self.num_features, 10**channels
        self.class_names = tuple(map(str, range(self.num_classes)))

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = super()._forward(images.flatten(0, 1).unsqueeze(1))
        logits, *others = logits.view(*images.shape[:2], -1).unbind(1)
        for digits in others:
            logits = (logits.unsqueeze(2) + digits.unsqueeze(1)).flatten(1)
        return features.view(len(images), -1), logits


def load_mnist(dataset: Dataset, device: torch.device) -> FeatureExtractor:
    """Returns the features of digits. Raises UserError for every dataset but MNIST and Stacked MNIST: they see a digit
    in anything."""
    own = f"[own] (made by {training_command(dataset)}), " if dataset.num_classes > 1 else ""
    instead = f"use evaluation.features {own}{OTHERS}"
    if dataset.kind not in CHANNELS:
        text = f"the 'mnist' features know MNIST's digits alone, and dataset {dataset.name} is of kind {dataset.kind}"
        for kind, channels in CHANNELS.items():
            if dataset.image_shape == (channels, *MNIST_SHAPE[1:]):
                instead += "; or, if it does hold these digits, prepare it, or compare with it, with "
                instead += f'--kind {kind}, or write "kind": "{kind}" into its dataset.json'
        raise UserError(f"{text}: {instead}")
    shape = (CHANNELS[dataset.kind], *MNIST_SHAPE[1:])
    if dataset.image_shape != shape:
        raise UserError(f"the 'mnist' features score images of shape {shape}, not {dataset.image_shape}: {instead}")
    return MnistFeatures(device, shape[0])


def training_command(dataset: Dataset) -> str:
    """Returns the command that trains a dataset's classifier."""
    return f"gan-pipeline train-classifier --dataset {dataset.folder}"


def near_chance(accuracy: float, num_classes: int, command: str) -> str | None:
    """Returns a warning if a classifier that `command` trained knows little more than guessing does."""
    chance, epochs = 1 / num_classes, command.rpartition("--epochs ")[2]
    if accuracy >= min((1 + chance) / 2, 3 * chance):
        return None
    more = f"more than {epochs}" if epochs.isdecimal() else "more"
    text = f"test accuracy {accuracy:.1%} where guessing has {chance:.1%}: features `own` mean little"
    return f"{text}, try train-classifier with {more} --epochs, or more images"


def classifier_path(dataset: Dataset) -> Path:
    """Returns where the dataset's classifier is, or will be.

    Raises:
        UserError: The dataset has no classes, or lies behind a URL, where nothing can be written.
    """
    if dataset.num_classes < 2:
        raise UserError(
            f"dataset {dataset.name} has no classes, so there are no features of its own: use evaluation.features "
            f"{OTHERS}"
        )
    if dataset.base_url:
        raise UserError(
            f"dataset {dataset.name} lies behind {dataset.base_url}, where its classifier can't: index it with "
            "gan-pipeline prepare shards, which makes a folder for it"
        )
    return dataset.folder / "classifier.safetensors"


def load_own(dataset: Dataset, device: torch.device) -> FeatureExtractor:
    """Returns the features of a dataset's classifier. Raises UserError if it is missing, damaged or of other images."""
    path, command = classifier_path(dataset), training_command(dataset)
    if not path.is_file():
        raise UserError(f"the 'own' features need {path}, which is not there: make it with {command}")
    try:
        tensors, metadata = read_tensors(path)
        digest = digest_of(tensors)
        if metadata["sha256"] != digest:
            raise ValueError("its checksum does not match")
        if metadata["dataset"] != dataset.fingerprint:
            raise UserError(f"{path} was trained on another dataset: move it away and run {command}")
        # Image shape and class names come from the dataset, so its fingerprint is part of the features' identity.
        identity = f"{digest}:{dataset.fingerprint}".encode()
        return ClassifierFeatures(tensors, metadata, dataset.image_shape, dataset.class_names, identity, device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run {command}") from None
