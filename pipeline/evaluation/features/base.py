"""What a feature space is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

FORWARD_SIZE = 100
"""Images of a forward pass: small enough for a CPU's cache, and for Inception's 299 x 299 activations in memory.
It is fixed, because the rounding of a float32 convolution may depend on how many images it is given."""


class FeatureExtractor(ABC):
    """A frozen network that maps images to features (compared by FID, KID, ...) and logits (Inception Score, classes).

    Attributes:
        name: the key of its scores in an evaluation, fit for a file's name.
        num_features, num_classes: widths of the two outputs. Without classes there are no logits to speak of ([n, 0]).
        class_names: what the logits stand for; empty when that is not of interest.
        facts: what a reader of the scores should know of the network, kept with them.
        fingerprint: SHA-256 of the weights and of the version of the code around them. Scores with different
            fingerprints must not be compared.
    """

    name: str
    num_features: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    facts: Mapping[str, object] = {}

    def __init__(self, version: str, weights: bytes, device: torch.device) -> None:
        """`version` changes whenever the same weights begin to give other features."""
        self.fingerprint = hashlib.sha256(f"{self.name}:{version}:".encode() + weights).hexdigest()
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, C, H, W] in 0..255 on any device -> float32 [n, num_features], float32 [n, num_classes] on the CPU.

        Raises:
            TypeError: the images are not uint8; rescaling them is the caller's decision, never made here.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are {images.dtype}, expected torch.uint8 in 0..255")
        # Not TensorFloat-32, of cuDNN or cuBLAS: it would move the scores in their third digit against a CPU's.
        matmul = torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, False
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                outputs = [self._forward(part.to(self.device)) for part in torch.split(images, FORWARD_SIZE)]
        finally:
            matmul.allow_tf32 = before
        features, logits = (torch.cat(tensors).cpu() for tensors in zip(*outputs, strict=True))
        return features, logits

    @abstractmethod
    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass over at most FORWARD_SIZE images on the extractor's device."""


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors on any device, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
