"""`own`: the penultimate layer of a classifier of the dataset's own classes, which lies beside its images."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.features.base import FeatureExtractor, digest_of
from pipeline.evaluation.features.classifier import ClassifierFeatures, TrainedClassifier, training_command


def classifier_path(dataset: Dataset) -> Path:
    """Where the dataset's classifier is, or will be.

    Raises UserError for a dataset that can't have one: without classes, or behind a URL, where nothing can be written.
    """
    if dataset.num_classes < 2:
        raise UserError(
            f"dataset {dataset.name} has no labels, so there are no features of its own: use evaluation.features "
            "[inception] or [dinov2]"
        )
    if dataset.base_url:
        raise UserError(
            f"dataset {dataset.name} lies behind {dataset.base_url}, where its classifier can't: index it with "
            "pipeline/prepare.py shards, which makes a folder for it"
        )
    return dataset.folder / "classifier.safetensors"


def load_own(dataset: Dataset, device: torch.device, _: EvaluationConfig) -> FeatureExtractor:
    """Raises UserError when the dataset has no classifier, a damaged one, or one of other images."""
    path = classifier_path(dataset)
    command = training_command(dataset)
    if not path.is_file():
        raise UserError(f"the 'own' features need {path}, which is not there: make it with {command}")
    try:
        trained = TrainedClassifier.read(path)
        digest = digest_of(trained.tensors)
        if trained.metadata["sha256"] != digest:
            raise ValueError("its checksum does not match")
        if trained.metadata["dataset"] != dataset.fingerprint:
            raise UserError(f"{path} was trained on another dataset: move it away and run {command}")
        # Classes and shape are the dataset's, so its fingerprint belongs to the features' identity.
        identity = f"{digest}:{dataset.fingerprint}".encode()
        return ClassifierFeatures("own", trained, dataset.image_shape, dataset.class_names, identity, device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run {command}") from None
