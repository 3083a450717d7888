"""Networks whose weights their authors publish: `inception` and `dinov2`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import EvaluationConfig
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, digest_of

SIDE, PATCH = 224, 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green and blue in [0, 1]


class PublishedWeights(NamedTuple):
    """A weight file that the authors of a network publish."""

    setting: str  # the key of `evaluation` with its path; while that is null the file is in torch hub's folder
    url: str
    what: str  # what the file holds, for messages
    hash_prefix: str | None = None  # the first digits of its SHA-256

    def path(self, config: EvaluationConfig) -> Path:
        """Returns where the file is, or will be. Raises UserError if the setting names a file that does not exist."""
        path: str | None = getattr(config, self.setting)
        if path is None:
            return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name
        if not Path(path).is_file():
            raise UserError(f"evaluation.{self.setting} is {path}: no such file; give the path of one")
        return Path(path)

    def fetch(self, config: EvaluationConfig) -> None:
        """Downloads the file if it is missing. Raises UserError if the download fails."""
        path = self.path(config)
        if path.is_file():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.hash_prefix)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download {self.what} ({error}): put {self.url} at {path}, or set evaluation.{self.setting} to "
                "its path"
            ) from error


class InceptionFeatures(FeatureExtractor):
    """`inception`: torch-fidelity's port of the Inception v3 graph with which published FIDs are computed. It resizes
    images as TensorFlow 1 did. Grey images are repeated to RGB."""

    name = "inception"
    num_features = 2048
    num_classes = 1008
    weights = PublishedWeights(
        "inception_weights",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "the Inception v3 weights",
        hash_prefix="6726825d",
    )

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
                f"get {self.weights.url}"
            ) from error
        self.network.to(device)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


class Dinov2Features(FeatureExtractor):
    """`dinov2`: the ViT-L/14 features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675), which rank generators more as
    people do than Inception's features.

    They are the class token after the last layer norm, of images resized to 224 x 224 as the paper's program does it.
    There are no logits, so scores of classes, the Inception Score included, do not exist in this space.
    """

    name = "dinov2"
    num_classes = 0
    architecture = "vit_large_patch14_dinov2"  # timm's name
    weights = PublishedWeights(
        "dinov2_weights",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "the DINOv2 weights",
    )

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
                f"get {self.weights.url}"
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
