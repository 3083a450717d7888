"""Feature spaces that images are scored in.

`mnist`: penultimate layer of a small digit classifier whose weights ship with the package.
`inception`: torch-fidelity's port of the Inception v3 graph that published FIDs were computed with.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from pipeline.errors import UserError

MNIST_WEIGHTS = Path(__file__).with_name("mnist_classifier.safetensors")
MNIST_SHAPE = (1, 28, 28)
FORWARD_SIZE = 100
"""Images of a forward pass: small enough for a CPU's cache, and for Inception's 299 x 299 activations in memory.
It is fixed, because the rounding of a float32 convolution may depend on how many images it is given."""


class FeatureExtractor(ABC):
    """A frozen network that maps images to features (compared by FID, KID, ...) and logits (Inception Score, classes).

    Attributes:
        name: the key of its scores in an evaluation.
        num_features, num_classes: widths of the two outputs.
        class_names: what the logits stand for; empty when that is not of interest.
        fingerprint: SHA-256 of the weights and of the version of the code around them. Scores with different
            fingerprints must not be compared.
    """

    name: str
    num_features: int
    num_classes: int
    class_names: tuple[str, ...] = ()

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
        # Not TensorFloat-32: it would move the scores in their third digit against a CPU's.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            outputs = [self._forward(part.to(self.device)) for part in torch.split(images, FORWARD_SIZE)]
        features, logits = (torch.cat(tensors).cpu() for tensors in zip(*outputs, strict=True))
        return features, logits

    @abstractmethod
    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass over at most FORWARD_SIZE images on the extractor's device."""


class MnistClassifier(nn.Module):
    """Convolutional digit classifier with about 455,000 parameters and 128 non-negative features.

    There is no normalisation layer: the features' scale is what cross-entropy training makes it.
    """

    num_features = 128
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(64 * 7 * 7, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, 1, 28, 28] -> features [n, 128] after the ReLU, logits [n, 10]."""
        x = images.to(self.head.weight.dtype) / 255
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        features = F.relu(self.hidden(self.dropout(x.flatten(1))))
        return features, self.head(self.dropout(features))


class MnistFeatures(FeatureExtractor):
    name = "mnist"
    num_features = MnistClassifier.num_features
    num_classes = MnistClassifier.num_classes
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, device: torch.device, image_shape: tuple[int, int, int]) -> None:
        if tuple(image_shape) != MNIST_SHAPE:
            raise UserError(
                f"the 'mnist' features score images of shape {MNIST_SHAPE}, not {tuple(image_shape)}: "
                "use evaluation.features [inception]"
            )
        weights = MNIST_WEIGHTS.read_bytes()
        super().__init__("1", weights, device)
        self.network = MnistClassifier()
        self.network.load_state_dict(load_safetensors(weights))
        self.network.eval().to(device).to(memory_format=torch.channels_last)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images)
        return features, logits


class InceptionFeatures(FeatureExtractor):
    """Inception v3 with the TF1-compatible resize inside; images go in as they are, grey ones repeated to RGB."""

    name = "inception"
    num_features = 2048
    num_classes = 1008

    def __init__(self, device: torch.device, image_shape: tuple[int, int, int], path: Path) -> None:
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
        except (
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            TypeError,
            KeyError,
            ValueError,
        ) as error:
            raise UserError(
                f"evaluation.inception_weights {path} is not torch-fidelity's Inception v3 ({type(error).__name__}): "
                f"get {URL_INCEPTION_V3}"
            ) from error
        self.network.to(device)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def default_inception_weights() -> Path:
    """Where torch-fidelity keeps its own weight file, torch hub's folder, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name


def _downloaded_inception_weights() -> Path:
    """torch-fidelity's own weight file, fetched (and checked by its hash) when missing."""
    path = default_inception_weights()
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=path.stem.split("-")[-1])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download the Inception v3 weights ({error}): put {URL_INCEPTION_V3} at {path}, "
                "or set evaluation.inception_weights to its path"
            ) from error
    return path


def find_weights(names: Iterable[str], inception_weights: str | Path | None) -> Path | None:
    """The Inception v3 weight file where one of the feature spaces needs it: the path given, else a download.

    Raises:
        UserError: there is no such file, or it can't be downloaded.
    """
    if InceptionFeatures.name not in names:
        return None
    if inception_weights is None:
        return _downloaded_inception_weights()
    if not Path(inception_weights).is_file():
        raise UserError(f"evaluation.inception_weights is {inception_weights}: no such file")
    return Path(inception_weights)


def load_features(
    name: str, device: torch.device, image_shape: tuple[int, int, int], inception_weights: str | Path | None = None
) -> FeatureExtractor:
    """The extractor called `name` for images of shape (C, H, W).

    Raises:
        UserError: unknown name, images that it cannot score, or weights that are missing or damaged.
    """
    if name == MnistFeatures.name:
        return MnistFeatures(device, image_shape)
    if name == InceptionFeatures.name:
        path = find_weights([name], inception_weights)
        assert path is not None
        return InceptionFeatures(device, image_shape, path)
    raise UserError(f"evaluation.features holds {name!r}: choose from mnist, inception")
