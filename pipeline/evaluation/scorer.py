"""Scores images in a job of any number of processes, and keeps the result."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
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
from pipeline.evaluation.features import PUBLISHED, FeatureExtractor, load_all
from pipeline.export.generator_file import fingerprint
from pipeline.export.images import render_range, save_grid
from pipeline.models.interface import AnyGenerator
from pipeline.reporting.formatting import few_images
from pipeline.rng import evaluation_labels, seeded
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import neighbours, real_images


class Scorer:
    """Loads the feature extractors once, and refuses before training what could only fail after it.

    Raises:
        UserError: an unknown feature space, one that does not speak for this dataset, or missing weights.
    """

    _warned = False

    def __init__(self, config: EvaluationConfig, dataset: Dataset, runtime: Runtime, seed: int) -> None:
        self.config, self.dataset, self.runtime, self._seed = config, dataset, runtime, seed
        for weights in (PUBLISHED[name] for name in config.features if name in PUBLISHED):
            runtime.ranks.on_main(partial(weights.fetch, config))
        self.extractors = load_all(config, dataset, runtime.device)

    def with_seed(self, seed: int) -> Scorer:
        """The same, of other evaluation images."""
        other = copy.copy(self)
        other._seed = seed
        return other

    def score_generator(self, generator: AnyGenerator, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Scores evaluation images 0, ..., num_images - 1 of the generator, in eval mode: see `score`."""
        count, facts = self.config.num_images, facts | {"images_fingerprint": fingerprint(generator)}
        labels = evaluation_labels(0, count, generator.num_classes) if generator.num_classes else None
        return self.score(ImageSet(count, partial(render_range, generator, self._seed), labels), path, facts)

    def score(self, images: ImageSet, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Scores images and writes `path` (JSON) and, beside it, `neighbours-....png`: a row for each of the first
        images, with the training images nearest to it in the first feature space; and some real images.

        `facts` tell which images they are: "images_fingerprint" of their content; "target" may differ. Scores
        in other feature spaces that `path` holds of the same images, measured in the same way, are kept. Returns what
        was written, on every rank.

        Raises:
            UserError: before anything is done, when `path` holds scores of other images, or measured in another way.
            Preempted: a signal came.
            OSError: on the main process, the scores could not be written.
        """
        # It imports torch-fidelity and with it torchvision, which would double the time until a training starts.
        from pipeline.evaluation.evaluate import evaluate_images

        config, ranks, dataset = self.config, self.runtime.ranks, self.dataset
        facts = facts | {"num_images": images.num_images, "reference": config.reference, "seed": self._seed}
        facts |= {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
        kept = ranks.on_main(lambda: _kept_scores(path, facts, self.extractors))
        if (warning := few_images(images.num_images)) and not self._warned:
            self.runtime.say(warning)
            self._warned = True
        scores = evaluate_images(
            images,
            dataset,
            self.extractors,
            reference=config.reference,
            batch_size=config.batch_size,
            seed=self._seed,
            ranks=ranks,
            interrupted=self.runtime.stop.known,
        )
        result = facts | ({"warning": warning} if warning else {}) | {"features": kept | scores}
        if ranks.is_main:
            self._draw_real_images(10 if images.labels is not None else 4, path)
            write_text(path, json.dumps(result, indent=1))
            nearest: Any = scores[self.extractors[0].name].get("nearest_training_images")
            if nearest is not None:
                self._draw_neighbours(images, torch.tensor(nearest["indices"]), neighbours(path))
        return result

    def _draw_real_images(self, columns: int, scores: Path) -> None:
        """As many as a grid of samples has, drawn from the reference split; once for a folder."""
        path, split = real_images(scores, self.dataset.fingerprint), self.config.reference
        if not path.exists():
            draws = seeded(self._seed, "real images shown")
            indices = torch.randint(self.dataset.num_images(split), (columns**2,), generator=draws)
            save_grid(load_images(self.dataset, split, indices), path, columns)

    def _draw_neighbours(self, images: ImageSet, indices: Tensor, path: Path) -> None:
        shown = images.render(0, len(indices))
        nearest = load_images(self.dataset, "train", indices.flatten())
        rows = torch.cat([shown.unsqueeze(1), nearest.view(*indices.shape, *shown.shape[1:])], dim=1)
        save_grid(rows.flatten(0, 1), path, columns=rows.shape[1])


def _kept_scores(path: Path, facts: dict[str, Any], extractors: Sequence[FeatureExtractor]) -> dict[str, Any]:
    """The scores by feature space that `path` already holds of what `facts` describe; those of `extractors` must be
    by the same ones."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        kept = dict(before["features"])
        pairs = [(key, before.get(key), value) for key, value in facts.items() if key != "target"]
        for extractor in extractors:
            if scores := kept.get(extractor.name):
                pairs.append((extractor.name, scores["provenance"]["extractor"], extractor.fingerprint))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error}): delete it") from None
    differing = [f"{key} is {_told(there)} there and {_told(here)} here" for key, there, here in pairs if there != here]
    if differing:
        raise UserError(f"{path}: holds other scores ({'; '.join(differing)}): name another file with --out")
    return kept


def _told(value: object) -> str:
    """A value of the facts, in a message."""
    if value is None:
        return "not told"
    return f"{value:.12}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
