"""`inception`: torch-fidelity's port of the Inception v3 graph that published FIDs were computed with."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.features.base import FeatureExtractor

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's own weights. The name ends in the first digits of their SHA-256."""


class InceptionFeatures(FeatureExtractor):
    """Inception v3 with the TF1-compatible resize inside; images go in as they are, grey ones repeated to RGB."""

    name = "inception"
    num_features = 2048
    num_classes = 1008

    def __init__(
        self, device: torch.device, image_shape: tuple[int, int, int], inception_weights: str | Path | None
    ) -> None:
        # It imports torchvision with all its models, which takes longer than importing torch.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = find_weights(inception_weights)
        if image_shape[0] not in (1, 3):
            raise UserError(f"the 'inception' features need images of 1 or 3 channels, not {image_shape[0]}")
        content = path.read_bytes()
        super().__init__("1", content, device)
        try:
            # torch-fidelity unpickles without restrictions: it only gets bytes that proved to hold nothing but tensors.
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(content)
            )
        except Exception as error:  # bytes of any kind have made the unpickler raise nearly every type there is
            raise UserError(
                f"evaluation.inception_weights {path} is not torch-fidelity's Inception v3 ({type(error).__name__}): "
                f"get {URL}"
            ) from error
        self.network.to(device)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def default_inception_weights() -> Path:
    """Where torch-fidelity keeps its own weight file, torch hub's folder, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name


def find_weights(inception_weights: str | Path | None) -> Path:
    """The weight file given, or torch-fidelity's own, which is fetched (and checked by its hash) when it is missing.

    Raises:
        UserError: there is no such file, or it can't be downloaded.
    """
    path = default_inception_weights() if inception_weights is None else Path(inception_weights)
    if path.is_file():
        return path
    if inception_weights is not None:
        raise UserError(f"evaluation.inception_weights is {inception_weights}: no such file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=path.stem.split("-")[-1])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the Inception v3 weights ({error}): put {URL} at {path}, "
            "or set evaluation.inception_weights to its path"
        ) from error
    return path
