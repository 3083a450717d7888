"""torch-fidelity's scores, to compare ours with them: the numbers and the time."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from pipeline.benchmarking.measure import Works, ratio, time_in_turn
from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.distributed.process import Runtime
from pipeline.evaluation.evaluate import evaluate_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features.classifier import MnistFeatures
from pipeline.evaluation.metrics.scores import KID_SUBSET_SIZE

SCORING_ROUNDS = 3


class RegisteredMnistFeatures(FeatureExtractorBase):  # type: ignore[misc]
    """The shipped classifier as torch-fidelity takes it: `feature_extractor="mnist"`."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.extractor = MnistFeatures(torch.device("cpu"))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = dict(zip(("features", "logits"), self.extractor(images), strict=True))
        return tuple(outputs[name] for name in self.features_list)

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
    """Returns FID, KID and Inception Score of uint8 images (n, C, H, W) by `torch_fidelity.calculate_metrics`, on the
    CPU and under its names; `arguments` are further ones of that function."""
    # It takes datasets of bare images. A Subset only indexes what it is of, so a tensor will do.
    first, second = (Subset(images, range(len(images))) for images in (fake, real))  # type: ignore[arg-type, var-annotated]
    arguments |= {"cuda": False, "verbose": False, "save_cpu_ram": True}  # the last one: no worker processes
    scores: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=first, input2=second, fid=True, kid=True, isc=True, **arguments
    )
    return scores


def measure_scoring(config: Config, runtime: Runtime, dataset: Dataset) -> dict[str, float]:
    """Times the scoring of `evaluation.num_images` training digits against the test digits in `mnist` features, beside
    torch-fidelity's FID, Inception Score, KID, precision and recall of the same images and features.

    Real features are cached on both sides. Ours are more scores than those. Only on one CPU process, with MNIST.
    """
    if runtime.ranks.world_size > 1 or runtime.device.type != "cpu" or dataset.kind != "mnist":
        return {}
    (images, _), (real, _) = (load_split(dataset, split) for split in ("train", "test"))
    images = images[: config.evaluation.num_images]
    ours = ImageSet.of_tensor(images), dataset, [MnistFeatures(runtime.device)]
    theirs = {"feature_extractor": "mnist", "batch_size": config.evaluation.batch_size, "prc": True}
    theirs |= {"prc_neighborhood": config.evaluation.neighbours, "kid_subset_size": min(KID_SUBSET_SIZE, len(images))}
    with tempfile.TemporaryDirectory() as cache:
        theirs |= {"cache_root": cache, "input2_cache_name": "mnist-test"}
        works: Works = {
            "scoring": partial(evaluate_images, *ours, replace(config.evaluation, reference="test")),
            "torch_fidelity": partial(fidelity_scores, images, real, **theirs),
        }
        seconds = time_in_turn(works, SCORING_ROUNDS, runtime)  # the warm-up fills the caches
    return {
        "scored_images": len(images),
        "scoring_seconds": median(seconds["scoring"]),
        "torch_fidelity_seconds": median(seconds["torch_fidelity"]),
        "scoring_speedup_over_torch_fidelity": ratio(seconds["torch_fidelity"], seconds["scoring"]),
    }
