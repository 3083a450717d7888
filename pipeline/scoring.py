"""Scores a generator in a job of any number of processes and writes the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data.manifest import Dataset
from pipeline.files import write_text
from pipeline.metrics.cache import Interrupted
from pipeline.metrics.evaluation import evaluate_images
from pipeline.metrics.features import load_features
from pipeline.networks import Generator
from pipeline.pictures import render_range
from pipeline.progress import bar
from pipeline.runtime import Preempted, Runtime
from pipeline.sampling import evaluation_labels


class Scorer:
    """Loads the feature extractors once, and refuses before training what could only fail after it.

    Raises:
        UserError: an unknown feature space, one that does not take this dataset's images, or missing weights.
    """

    def __init__(self, config: EvaluationConfig, dataset: Dataset, runtime: Runtime, seed: int) -> None:
        self._config, self._dataset, self._runtime, self._seed = config, dataset, runtime, seed
        self._extractors = [
            load_features(name, runtime.device, dataset.image_shape, config.inception_weights)
            for name in config.features
        ]

    def score(self, generator: Generator, step: int, path: Path) -> dict[str, Any]:
        """Scores evaluation images 0, ..., num_images - 1 of the generator, in eval mode, and writes `path`.

        Scores in other feature spaces that `path` already holds of the same images are kept.

        Returns:
            What was written, on every rank.

        Raises:
            Preempted: a signal came.
        """
        config = self._config

        def images(start: int, stop: int) -> Tensor:
            return render_range(generator, self._seed, start, stop)

        labels = evaluation_labels(0, config.num_images, generator.num_classes) if generator.num_classes else None
        runtime = self._runtime
        with bar(
            total=-(-config.num_images // runtime.world_size),
            desc="evaluation",
            unit="image",
            leave=False,
            disable=not runtime.is_main,
        ) as progress:
            try:
                features = evaluate_images(
                    images,
                    config.num_images,
                    self._dataset,
                    self._extractors,
                    reference=config.reference,
                    batch_size=config.batch_size,
                    seed=self._seed,
                    rank=runtime.rank,
                    world_size=runtime.world_size,
                    progress=progress.update,
                    labels=labels,
                    interrupted=runtime.stop_known,
                )
            except Interrupted:
                raise Preempted("the evaluation was interrupted: start it again") from None
        result = {
            "step": step,
            "num_images": config.num_images,
            "reference": config.reference,
            "weights": config.weights,
            "seed": self._seed,
            "features": features,
        }
        return runtime.on_main(lambda: _write(result, path))


def _write(result: dict[str, Any], path: Path) -> dict[str, Any]:
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == result[key] for key in result if key != "features"):
            result["features"] = before["features"] | result["features"]
    write_text(path, json.dumps(result, indent=1))
    return result
