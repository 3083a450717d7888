"""`dinov2`: the ViT-L/14 features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675), which rank generators more as
people do than Inception's."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.features.base import FeatureExtractor, digest_of
from pipeline.evaluation.features.weights import PublishedWeights

WEIGHTS = PublishedWeights(
    "dinov2_weights",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "the DINOv2 weights",
)
SIDE, PATCH = 224, 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of red, green and blue in [0, 1]."""


class Dinov2Features(FeatureExtractor):
    """The class token after the last layer norm, of images resized to 224 x 224 as the paper's own program does it.

    There are no logits: a score that needs classes, like the Inception Score, does not exist here.
    """

    name = "dinov2"
    num_classes = 0
    architecture = "vit_large_patch14_dinov2"
    """timm's name for it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            import timm  # it imports torchvision, which takes longer than importing torch
        except ImportError:
            raise UserError("the 'dinov2' features need timm: pip install 'gan-pipeline[dinov2]'") from None

        self.network: nn.Module = timm.create_model(self.architecture, img_size=SIDE, num_classes=0)
        try:
            is_safe = path.suffix == ".safetensors"
            tensors = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
            tensors.pop("mask_token", None)  # of its training
            tensors["pos_embed"] = positions(tensors["pos_embed"])
            self.network.load_state_dict(tensors)
        except Exception as error:  # bytes of any kind have made the unpickler raise nearly every type there is
            raise UserError(
                f"evaluation.dinov2_weights {path} is not DINOv2's {self.architecture} ({type(error).__name__}): "
                f"get {WEIGHTS.url}"
            ) from error
        self.num_features = len(tensors["norm.bias"])
        super().__init__("1", digest_of(self.network.state_dict()).encode(), device)
        self.network.eval().to(device)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network(prepared(images))
        return features, features.new_empty(len(features), 0)


def prepared(images: Tensor) -> Tensor:
    """uint8 [n, C, H, W], grey or RGB -> float32 [n, 3, 224, 224], resized as Pillow's bicubic filter does it (its two
    passes both end in whole numbers of 0..255), and normalised."""
    resized = images.double()  # in float32 one value in 200 is rounded to its other side
    for size in ((images.shape[2], SIDE), (SIDE, SIDE)):
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (resized.float() / 255 - mean) / deviation


def positions(embedding: Tensor) -> Tensor:
    """Position embeddings [1, 1 + 37 * 37, d] of the 518 x 518 images that DINOv2 was trained on, for 224 x 224:
    [1, 1 + 16 * 16, d].

    The authors' network scales by (16 + 0.1) / 37 without antialiasing, which timm does not.
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    grid = embedding[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (SIDE // PATCH + 0.1) / side
    resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def load_dinov2(dataset: Dataset, device: torch.device, config: EvaluationConfig) -> FeatureExtractor:
    """Raises UserError for images of other than 1 or 3 channels, without timm, and for weights that are missing or
    damaged."""
    path = WEIGHTS.path(config)
    if dataset.image_shape[0] not in (1, 3):
        raise UserError(f"the 'dinov2' features need images of 1 or 3 channels, not {dataset.image_shape[0]}")
    return Dinov2Features(path, device)
