"""Scores images in a job of any number of processes, and keeps the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data.manifest import Dataset
from pipeline.data.resident import load_images
from pipeline.errors import Preempted, UserError
from pipeline.metrics.cache import Interrupted
from pipeline.metrics.evaluation import SHOWN_IMAGES, evaluate_images
from pipeline.metrics.features import find_weights, load_features
from pipeline.models.networks import Generator
from pipeline.pictures import render_range, save_grid
from pipeline.progress import bar
from pipeline.rng import evaluation_labels
from pipeline.distributed.process import Runtime
from pipeline.storage.files import write_text


class Scorer:
    """Loads the feature extractors once, and refuses before training what could only fail after it.

    Raises:
        UserError: an unknown feature space, one that does not take this dataset's images, or missing weights.
    """

    def __init__(self, config: EvaluationConfig, dataset: Dataset, runtime: Runtime, seed: int) -> None:
        self._config, self._dataset, self._runtime, self._seed = config, dataset, runtime, seed
        weights = runtime.on_main(lambda: find_weights(config.features, config.inception_weights))
        self.extractors = [
            load_features(name, runtime.device, dataset.image_shape, weights) for name in config.features
        ]

    def score_generator(self, generator: Generator, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Scores evaluation images 0, ..., num_images - 1 of the generator, in eval mode: see `score`."""
        count = self._config.num_images
        labels = evaluation_labels(0, count, generator.num_classes) if generator.num_classes else None

        def render(start: int, stop: int) -> Tensor:
            return render_range(generator, self._seed, start, stop)

        return self.score(render, count, labels, path, facts)

    def score(
        self,
        render: Callable[[int, int], Tensor],
        num_images: int,
        labels: Tensor | None,
        path: Path,
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Scores images and writes `path` (JSON) and, beside it, `neighbours-....png`: a row for each of the first
        images, with the training images nearest to it in the first feature space.

        Scores in other feature spaces that `path` holds of the same images are kept.

        Args:
            render, num_images, labels: see `evaluate_images`.
            facts: which images these are.

        Returns:
            What was written, on every rank.

        Raises:
            UserError: before anything is done, when `path` holds scores of other images.
            Preempted: a signal came.
            OSError: on the main process, the scores could not be written.
        """
        config, runtime = self._config, self._runtime
        facts |= {"num_images": num_images, "reference": config.reference, "seed": self._seed}
        kept = runtime.on_main(lambda: _kept_scores(path, facts))
        with bar(
            total=-(-num_images // runtime.world_size),
            desc="evaluation",
            unit="image",
            leave=False,
            disable=not runtime.is_main,
        ) as progress:
            try:
                scores = evaluate_images(
                    render,
                    num_images,
                    self._dataset,
                    self.extractors,
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
        result = facts | {"features": kept | scores}
        if runtime.is_main:
            write_text(path, json.dumps(result, indent=1))
            self._draw_neighbours(scores, render(0, min(SHOWN_IMAGES, num_images)), path)
        return result

    def _draw_neighbours(self, scores: dict[str, Any], images: Tensor, path: Path) -> None:
        found = scores[self.extractors[0].name].get("nearest_training_images")
        if found is not None:
            indices = torch.tensor(found["indices"])
            nearest = load_images(self._dataset, "train", indices.flatten())
            rows = torch.cat([images.unsqueeze(1), nearest.view(*indices.shape, *images.shape[1:])], dim=1)
            picture = path.with_name(f"neighbours-{path.stem.removeprefix('step-')}.png")
            save_grid(rows.flatten(0, 1), picture, columns=rows.shape[1])


def _kept_scores(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The scores that `path` already holds of the images that `facts` describes, by feature space."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        differences = [
            f"{key} is {before.get(key)} there and {value} here"
            for key, value in facts.items()
            if before.get(key) != value
        ]
        if not differences:
            return dict(before["features"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error}): delete it") from None
    raise UserError(f"{path}: holds other scores ({'; '.join(differences)}): name another file with --out")
