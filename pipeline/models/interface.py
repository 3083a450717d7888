"""What training, checkpoints, exports, ONNX and evaluation need of a generator, the reference's or another."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.config import NetworkConfig


class AnyGenerator(nn.Module):
    """Latents (n, latent_dim), entries in [-1, 1] -> mirrored images (n, C, H, W), pixels in [0, 1].

    With classes it also takes labels (n,) int64 in [0, num_classes); without, what is given is left alone.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.config, self.image_shape, self.num_classes = config, image_shape, num_classes
        self.class_names: tuple[str, ...] = ()
        """Label i asks for class_names[i]; empty where nothing has said the names, as files of earlier versions do not.
        It is no part of `spec`, because a name changes nothing that is computed."""

    def spec(self) -> dict[str, Any]:
        """What it can be rebuilt from (`generator_of_spec`), as JSON-serialisable values.

        Fingerprints of scored images are of these too: a generator's must stay what they are.
        """
        network = {"latent_dim": self.config.latent_dim, "width": self.config.width}
        return {"network": network, "image_shape": list(self.image_shape), "num_classes": self.num_classes}
