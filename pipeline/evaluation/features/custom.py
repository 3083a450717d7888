"""`module:NAME`: a feature network of the user's.

NAME is a torch.nn.Module, or a function without arguments that makes one. In eval mode the module takes images uint8
[n, C, H, W] in 0..255 and returns features [n, d], or a pair of features and logits [n, k]; row i may depend on image i
alone. The user's module is imported only when `evaluation.features` names it.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import import_object
from pipeline.data import Dataset
from pipeline.errors import UserError, describe_error
from pipeline.evaluation.features import FeatureExtractor, digest_of


class CustomFeatures(FeatureExtractor):
    """The features of a user's network. Raises UserError if it fails on two black images of `image_shape`."""

    def __init__(
        self, name: str, network: nn.Module, identity: bytes, image_shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self.name, self.network = name, network.eval().to(device)
        super().__init__("1", identity, device)
        try:
            features, logits = self(torch.zeros(2, *image_shape, dtype=torch.uint8))
        except Exception as error:  # the user's code may raise anything
            text = f"{name} was given uint8 {[2, *image_shape]} and failed ({describe_error(error)})"
            raise UserError(f"evaluation.features: {text}") from error
        self.num_features, self.num_classes = features.shape[1], logits.shape[1]

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.network(images)
        features, logits = outputs if isinstance(outputs, tuple) else (outputs, outputs.new_empty(len(images), 0))
        for tensor in (features, logits):
            if tensor.shape[:1] != images.shape[:1] or tensor.ndim != 2:
                raise ValueError(f"it returned {list(tensor.shape)}, not a row for each of {len(images)} images")
        return features.float(), logits.float()


def load_module(name: str, dataset: Dataset, device: torch.device) -> FeatureExtractor:
    """Returns the extractor of the network that `name` stands for. Its fingerprint covers the module's source file and
    the weights, but not what the module imports."""
    network = import_object("evaluation.features", name)
    if not isinstance(network, nn.Module) and callable(network):
        network = network()
    if not isinstance(network, nn.Module):
        raise UserError(f"evaluation.features holds {name!r}: that is a {type(network).__name__}, not a torch module")
    source = Path(inspect.getfile(sys.modules[name.partition(":")[0]])).read_bytes()
    identity = hashlib.sha256(source).hexdigest() + digest_of(network.state_dict())
    return CustomFeatures(name, network, identity.encode(), dataset.image_shape, device)
