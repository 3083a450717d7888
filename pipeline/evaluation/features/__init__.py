"""Feature spaces: the frozen networks whose outputs the scores compare.

Each space is a class in a file of this folder and a line of SPACES; the file is imported when the space is used. Users
bring networks of their own as `module:NAME`, see CustomFeatures.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.config import EvaluationConfig, import_object
from pipeline.data import Dataset
from pipeline.data.dataset import naming
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.features.published import PublishedWeights
    from pipeline.evaluation.metrics.frechet import Moments

SPACES = {
    "mnist": "classifier.load_mnist",
    "own": "classifier.load_own",
    "inception": "published.InceptionFeatures",
    "dinov2": "published.Dinov2Features",
}
"""The files and what makes an extractor in them: of `(dataset, device)`, or of the `(path, device)` of published
weights, which the class then describes as `weights`. It raises UserError for a dataset that the space does not fit."""
FORWARD_SIZE = 100
"""Images of one forward pass. It is fixed because the rounding of a float32 convolution may depend on their number."""


class FeatureExtractor(ABC):
    """A frozen network that maps images to features (compared by FID, KID, ...) and logits (Inception Score, classes).

    Attributes:
        name: The key of its scores in an evaluation, also in the names of files.
        num_features, num_classes: Widths of the two outputs; num_classes is 0 without logits.
        class_names: The classes that the logits stand for; empty if they are not a dataset's classes.
        facts: What a reader of the scores should know about the network; written beside them.
        fingerprint: SHA-256 of the weights and of the version of the code around them. Scores with different
            fingerprints do not compare.
        warning: What is said before anything is scored, if the features mean little.
        published: Moments of these features that somebody published, which images are compared with as well.
    """

    name: str
    num_features: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    facts: Mapping[str, object] = {}
    warning: str | None = None
    published: Moments | None = None

    def __init__(self, version: str, weights: bytes, device: torch.device) -> None:
        """Sets the fingerprint. `version` must change whenever the same weights begin to give other features."""
        self.fingerprint = hashlib.sha256(f"{self.name}:{version}:".encode() + weights).hexdigest()
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features float32 [n, num_features] and logits float32 [n, num_classes], on the CPU, of images uint8
        [n, C, H, W] in 0..255 on any device.

        Raises:
            TypeError: The images are not uint8. How to rescale others is the caller's decision.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are {images.dtype}, expected torch.uint8 in 0..255")
        # TensorFloat-32, in cuDNN's convolutions or cuBLAS's products, would change the third digit of the scores.
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
        """Runs the network once, on at most FORWARD_SIZE images on its device."""


class CustomFeatures(FeatureExtractor):
    """`module:NAME`: the features of a user's network.

    NAME is a torch.nn.Module, or a function without arguments that makes one. In eval mode the module takes images
    uint8 [n, C, H, W] in 0..255 and returns features [n, d], or a pair of features and logits [n, k]; row i may depend
    on image i alone. The user's module is imported only when `evaluation.features` names it. The fingerprint covers the
    module's source file and the weights, but not what the module imports.

    Raises:
        UserError: NAME is no such thing, or the network fails on two black images of `image_shape`.
    """

    def __init__(self, name: str, image_shape: tuple[int, int, int], device: torch.device) -> None:
        network = import_object("evaluation.features", name)
        if not isinstance(network, nn.Module) and callable(network):
            with naming(f"evaluation.features: {name} is called without arguments, to return a module, and failed"):
                network = network()
        if not isinstance(network, nn.Module):
            raise UserError(
                f"evaluation.features holds {name!r}: that is a {type(network).__name__}, not a torch module"
            )
        source = Path(inspect.getfile(sys.modules[name.partition(":")[0]])).read_bytes()
        identity = hashlib.sha256(source).hexdigest() + digest_of(network.state_dict())
        self.name, self.network = name, network.eval().to(device)
        super().__init__("1", identity.encode(), device)
        with naming(f"evaluation.features: {name} was given uint8 {[2, *image_shape]} and failed"):
            features, logits = self(torch.zeros(2, *image_shape, dtype=torch.uint8))
        self.num_features, self.num_classes = features.shape[1], logits.shape[1]

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.network(images)
        features, logits = outputs if isinstance(outputs, tuple) else (outputs, outputs.new_empty(len(images), 0))
        for tensor in (features, logits):
            if tensor.shape[:1] != images.shape[:1] or tensor.ndim != 2:
                raise ValueError(f"it returned {list(tensor.shape)}, not a row for each of {len(images)} images")
        return features.float(), logits.float()


def published_weights(name: str) -> PublishedWeights | None:
    """Returns the file of published weights that the space called `name` needs, if it needs one."""
    make = resolve_name(f"{__name__}.{SPACES[name]}") if name in SPACES else None
    weights: PublishedWeights | None = getattr(make, "weights", None)
    return weights


def load_features(name: str, dataset: Dataset, device: torch.device, config: EvaluationConfig) -> FeatureExtractor:
    """Returns the extractor called `name` for a dataset's images.

    Raises:
        UserError: The name is unknown, the space does not fit the dataset, or its weights are missing or damaged.
    """
    if name.startswith("torchscript:"):
        raise UserError(f"evaluation.features holds {name!r}: load the file in a module of yours, named as module:NAME")
    if name not in SPACES and ":" not in name:
        raise UserError(f"evaluation.features holds {name!r}: choose from {', '.join(SPACES)} and module:NAME")
    with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global generator
        if name not in SPACES:
            return CustomFeatures(name, dataset.image_shape, device)
        make: Callable[..., FeatureExtractor] = resolve_name(f"{__name__}.{SPACES[name]}")
        if (weights := published_weights(name)) is None:
            return make(dataset, device)
        if dataset.image_shape[0] not in (1, 3):
            raise UserError(f"the {name!r} features need images of 1 or 3 channels, not {dataset.image_shape[0]}")
        return make(weights.path(config), device)


def load_all(config: EvaluationConfig, dataset: Dataset, device: torch.device) -> list[FeatureExtractor]:
    """Returns the extractors that evaluation.features names, the one of inception with the moments of
    evaluation.reference_statistics. Raises UserError as `load_features` does, and for a file that cannot be used."""
    names = config.features
    if len({*names}) < len(names):
        raise UserError(f"evaluation.features holds two spaces of one name ({', '.join(names)}): leave one out")
    extractors = {name: load_features(name, dataset, device, config) for name in names}
    if path := config.reference_statistics:
        from pipeline.evaluation.metrics.frechet import Moments  # here: a training without such a file takes no scores

        if (inception := extractors.get("inception")) is None:
            raise UserError(
                f"evaluation.reference_statistics is {path}, which is of inception's features: evaluation.features "
                f"{names} must name inception, or leave the file out"
            )
        inception.published = Moments.of_file(Path(path), inception.num_features)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        inception.facts = {"reference_statistics": {"path": str(Path(path)), "sha256": digest}}
    return [*extractors.values()]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of named tensors, which does not depend on their device or on the file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
