"""`inception`: torch-fidelity's port of the Inception v3 graph with which published FIDs are computed."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, PublishedWeights

WEIGHTS = PublishedWeights(
    "inception_weights",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "the Inception v3 weights",
    hash_prefix="6726825d",
)


class InceptionFeatures(FeatureExtractor):
    """Inception v3, which resizes images as TensorFlow 1 did. Grey images are repeated to RGB."""

    name = "inception"
    num_features = 2048
    num_classes = 1008

    def __init__(self, path: Path, device: torch.device) -> None:
        # It imports torchvision with all its models, which takes longer than importing torch.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        content = path.read_bytes()
        super().__init__("1", content, device)
        try:
            # torch-fidelity unpickles without restrictions, so these bytes must first prove to hold nothing but
            # tensors.
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(content)
            )
        except Exception as error:  # on arbitrary bytes the unpickler raises nearly every type of exception
            raise UserError(
                f"evaluation.inception_weights {path} is not torch-fidelity's Inception v3 ({type(error).__name__}): "
                f"get {WEIGHTS.url}"
            ) from error
        self.network.to(device)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits
