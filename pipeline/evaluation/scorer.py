"""Scores images in a job of any number of processes, and keeps the result."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data.manifest import Dataset
from pipeline.data.resident import load_images
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import find_weights, load_features
from pipeline.export.images import render_range, save_grid
from pipeline.models.networks import Generator
from pipeline.rng import evaluation_labels
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import neighbours


class Scorer:
    """Loads the feature extractors once, and refuses before training what could only fail after it.

    Raises:
        UserError: an unknown feature space, one that does not take this dataset's images, or missing weights.
    """

    def __init__(self, config: EvaluationConfig, dataset: Dataset, runtime: Runtime, seed: int) -> None:
        self.config, self.dataset, self.runtime, self._seed = config, dataset, runtime, seed
        weights = None
        if "inception" in config.features:
            weights = runtime.ranks.on_main(lambda: find_weights(config.inception_weights))
        shape = dataset.image_shape
        self.extractors = [load_features(name, runtime.device, shape, weights) for name in config.features]

    def with_seed(self, seed: int) -> Scorer:
        """The same, of other evaluation images."""
        other = copy.copy(self)
        other._seed = seed
        return other

    def score_generator(self, generator: Generator, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Scores evaluation images 0, ..., num_images - 1 of the generator, in eval mode: see `score`."""
        count = self.config.num_images
        labels = evaluation_labels(0, count, generator.num_classes) if generator.num_classes else None
        return self.score(ImageSet(count, partial(render_range, generator, self._seed), labels), path, facts)

    def score(self, images: ImageSet, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Scores images and writes `path` (JSON) and, beside it, `neighbours-....png`: a row for each of the first
        images, with the training images nearest to it in the first feature space.

        Scores in other feature spaces that `path` holds of the same images are kept. `facts` tell which images they
        are. Returns what was written, on every rank.

        Raises:
            UserError: before anything is done, when `path` holds scores of other images.
            Preempted: a signal came.
            OSError: on the main process, the scores could not be written.
        """
        # It imports torch-fidelity and with it torchvision, which would double the time until a training starts.
        from pipeline.evaluation.evaluate import evaluate_images

        config, ranks = self.config, self.runtime.ranks
        facts = facts | {"num_images": images.num_images, "reference": config.reference, "seed": self._seed}
        kept = ranks.on_main(lambda: _kept_scores(path, facts))
        scores = evaluate_images(
            images,
            self.dataset,
            self.extractors,
            reference=config.reference,
            batch_size=config.batch_size,
            seed=self._seed,
            ranks=ranks,
            interrupted=self.runtime.stop.known,
        )
        result = facts | {"features": kept | scores}
        if ranks.is_main:
            write_text(path, json.dumps(result, indent=1))
            nearest: Any = scores[self.extractors[0].name].get("nearest_training_images")
            if nearest is not None:
                self._draw_neighbours(images, torch.tensor(nearest["indices"]), neighbours(path))
        return result

    def _draw_neighbours(self, images: ImageSet, indices: Tensor, path: Path) -> None:
        shown = images.render(0, len(indices))
        nearest = load_images(self.dataset, "train", indices.flatten())
        rows = torch.cat([shown.unsqueeze(1), nearest.view(*indices.shape, *shown.shape[1:])], dim=1)
        save_grid(rows.flatten(0, 1), path, columns=rows.shape[1])


def _kept_scores(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The scores that `path` already holds of the images that `facts` describes, by feature space."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        differing = [key for key in facts if before.get(key) != facts[key]]
        if not differing:
            return dict(before["features"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error}): delete it") from None
    differences = "; ".join(f"{key} is {before.get(key)} there and {facts[key]} here" for key in differing)
    raise UserError(f"{path}: holds other scores ({differences}): name another file with --out")
