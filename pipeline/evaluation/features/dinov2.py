"""`dinov2`: the ViT-L/14 features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675), which rank generators more as
people do than Inception's features."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, PublishedWeights, digest_of

WEIGHTS = PublishedWeights(
    "dinov2_weights",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "the DINOv2 weights",
)
SIDE, PATCH = 224, 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green and blue in [0, 1]


class Dinov2Features(FeatureExtractor):
    """The class token after the last layer norm, of images resized to 224 x 224 as the paper's program does it. There
    are no logits, so scores of classes, the Inception Score included, do not exist in this space."""

    name = "dinov2"
    num_classes = 0
    architecture = "vit_large_patch14_dinov2"  # timm's name

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            import timm  # it imports torchvision, which takes longer than importing torch
        except ImportError:
            raise UserError("the 'dinov2' features need timm: pip install 'gan-pipeline[dinov2]'") from None

        self.network: nn.Module = timm.create_model(self.architecture, img_size=SIDE, num_classes=0)
        try:
            is_safe = path.suffix == ".safetensors"
            tensors = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
            tensors.pop("mask_token", None)  # only training uses it
            tensors["pos_embed"] = positions(tensors["pos_embed"])
            self.network.load_state_dict(tensors)
        except Exception as error:  # on arbitrary bytes the unpickler raises nearly every type of exception
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
    """Returns images uint8 [n, C, H, W], grey or RGB, as the network takes them: float32 [n, 3, 224, 224], normalised.

    They are resized like Pillow's bicubic filter does it, whose two passes both round to whole numbers in 0..255.
    """
    resized = images.double()  # in float32 one value in 200 is rounded to the wrong side
    for size in ((images.shape[2], SIDE), (SIDE, SIDE)):
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (resized.float() / 255 - mean) / deviation


def positions(embedding: Tensor) -> Tensor:
    """Resizes the position embeddings [1, 1 + 37 * 37, d] of the 518 x 518 images that DINOv2 was trained on to those
    of 224 x 224 images, [1, 1 + 16 * 16, d].

    The authors' network scales by (16 + 0.1) / 37 without antialiasing; timm's own resizing differs.
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    grid = embedding[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (SIDE // PATCH + 0.1) / side
    resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
