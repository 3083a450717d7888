"""torch-fidelity's scores, to compare with ours."""

from __future__ import annotations

from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pipeline.evaluation.features.mnist import MnistFeatures


class RegisteredMnistFeatures(FeatureExtractorBase):  # type: ignore[misc]
    """The shipped classifier as torch-fidelity takes it: `feature_extractor="mnist"`."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.extractor = MnistFeatures(torch.device("cpu"))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(("features", "logits"), self.extractor(images), strict=True))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


torch_fidelity.register_feature_extractor("mnist", RegisteredMnistFeatures)


def fidelity_scores(fake: Tensor, real: Tensor, **arguments: Any) -> dict[str, float]:
    """FID, KID and Inception Score of uint8 images (n, C, H, W) by `torch_fidelity.calculate_metrics`, on the CPU and
    under its names; `arguments` are more of its own."""
    # It takes datasets of bare images. A Subset asks nothing of what it is of but an image for an index.
    first, second = (Subset(images, range(len(images))) for images in (fake, real))  # type: ignore[arg-type, var-annotated]
    arguments |= {"cuda": False, "verbose": False, "save_cpu_ram": True}  # the last one: no worker processes
    scores: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=first, input2=second, fid=True, kid=True, isc=True, **arguments
    )
    return scores
