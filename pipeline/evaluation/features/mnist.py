"""`mnist`: the penultimate layer of a small digit classifier whose weights ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.features.base import FeatureExtractor
from pipeline.evaluation.features.classifier import ClassifierFeatures, TrainedClassifier, training_command

MNIST_WEIGHTS = Path(__file__).with_name("mnist_classifier.safetensors")
MNIST_SHAPE = (1, 28, 28)


class MnistFeatures(ClassifierFeatures):
    def __init__(self, device: torch.device) -> None:
        digits = tuple("0123456789")
        trained = TrainedClassifier.read(MNIST_WEIGHTS)
        super().__init__("mnist", trained, MNIST_SHAPE, digits, MNIST_WEIGHTS.read_bytes(), device)


def load_mnist(dataset: Dataset, device: torch.device, _: EvaluationConfig) -> FeatureExtractor:
    """Raises UserError for every dataset but MNIST: its classifier sees a digit in anything."""
    own = f"[own] (made by {training_command(dataset)}), " if dataset.num_classes > 1 else ""
    instead = f"use evaluation.features {own}[inception] or [dinov2]"
    if dataset.kind != "mnist":
        raise UserError(
            f"the 'mnist' features know MNIST's digits alone, and dataset {dataset.name} is of kind {dataset.kind}: "
            f'{instead}; or, if it does hold these digits, write "kind": "mnist" into its dataset.json'
        )
    if dataset.image_shape != MNIST_SHAPE:
        raise UserError(
            f"the 'mnist' features score images of shape {MNIST_SHAPE}, not {dataset.image_shape}: {instead}"
        )
    return MnistFeatures(device)
