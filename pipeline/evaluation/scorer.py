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
from pipeline.data import Dataset
from pipeline.data.resident import load_images
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluation.critic import MOST_IMAGES, critic_estimates, share_of_real_images
from pipeline.evaluation.extract import ImageSet, interruptible
from pipeline.evaluation.features import FORWARD_SIZE, PUBLISHED, FeatureExtractor, load_all
from pipeline.export.generator_file import fingerprint
from pipeline.export.images import render_range, save_grid
from pipeline.models.networks import AnyGenerator, Critic
from pipeline.reporting.read import USUAL_NEIGHBOURS, few_images
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
        self._real_shares: dict[str, Tensor] = {}

    def with_seed(self, seed: int) -> Scorer:
        """The same, of other evaluation images."""
        other = copy.copy(self)
        other._seed = seed
        return other

    def score_generator(
        self, generator: AnyGenerator, path: Path, facts: dict[str, Any], critic: Critic | None = None
    ) -> dict[str, Any]:
        """Scores evaluation images 0, ..., num_images - 1 of the generator, in eval mode: see `score`."""
        count, facts = self.config.num_images, facts | {"images_fingerprint": fingerprint(generator)}
        labels = evaluation_labels(0, count, generator.num_classes) if generator.num_classes else None
        return self.score(ImageSet(count, partial(render_range, generator, self._seed), labels), path, facts, critic)

    def score(
        self, images: ImageSet, path: Path, facts: dict[str, Any], critic: Critic | None = None
    ) -> dict[str, Any]:
        """Scores images and writes `path` (JSON) and, beside it, `neighbours-....png`: a row for each of the first
        images, with the training images nearest to it in the first feature space; and some real images.

        `facts` tell which images they are: "images_fingerprint" of their content; "target" may differ. A `critic`, of
        the same checkpoint, trained on this dataset and on the runtime's device, adds what evaluation/critic.py finds
        as "critic", and evaluation.gan_train adds what evaluation/gan_train.py finds as "gan_train". Scores that `path`
        holds of the same images, measured in the same way, are kept. Returns what was written, on every rank.

        Raises:
            UserError: before anything is done, when `path` holds scores of other images, or measured in another way, or
                evaluation.gan_train is asked of images without classes.
            Preempted: a signal came.
            OSError: on the main process, the scores could not be written.
        """
        # It imports torch-fidelity and with it torchvision, which would double the time until a training starts.
        from pipeline.evaluation.evaluate import evaluate_images

        config, ranks, dataset = self.config, self.runtime.ranks, self.dataset
        if config.gan_train and (images.labels is None or not dataset.num_classes):
            raise UserError("evaluation.gan_train is true, but the images were asked for no classes: set it to false")
        facts = facts | {"num_images": images.num_images, "reference": config.reference, "seed": self._seed}
        facts |= {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
        kept = ranks.on_main(lambda: _kept_scores(path, facts, self.extractors, config.neighbours))
        if (warning := few_images(images.num_images)) and not self._warned:
            self.runtime.print(warning)
            self._warned = True
        scores = evaluate_images(
            images,
            dataset,
            self.extractors,
            config,
            seed=self._seed,
            ranks=ranks,
            interrupted=self.runtime.stop.known,
        )
        if critic is not None and {"train", "test"} <= dataset.splits.keys():
            kept["critic"] = self._estimates(critic, images)
        if config.gan_train:
            kept["gan_train"] = self._gan_train(images)
        kept["features"] = kept.get("features", {}) | scores
        result = facts | ({"warning": warning} if warning else {}) | kept
        failure: OSError | None = None
        with interruptible(ranks, self.runtime.stop.known):  # a damaged shard that it meets ends all ranks
            try:
                if ranks.is_main:
                    self._write(result, scores[self.extractors[0].name], images, path)
            except OSError as error:  # of the main rank alone: a training tolerates it there
                failure = error
        if failure is not None:
            raise failure
        return result

    def _write(self, result: dict[str, Any], scores: dict[str, Any], images: ImageSet, path: Path) -> None:
        self._draw_real_images(10 if images.labels is not None else 4, path)
        write_text(path, json.dumps(result, indent=1))
        nearest = scores.get("nearest_training_images")
        if nearest is not None:
            self._draw_neighbours(images, torch.tensor(nearest["indices"]), neighbours(path))

    def _estimates(self, critic: Critic, images: ImageSet) -> dict[str, object]:
        ranks = self.runtime.ranks
        share = ranks.share(min(images.num_images, MOST_IMAGES), FORWARD_SIZE)
        with interruptible(ranks, self.runtime.stop.known) as poll:
            for split in ("train", "test"):
                poll()
                if split not in self._real_shares:  # once a run
                    self._real_shares[split] = share_of_real_images(self.dataset, split, ranks)
            parts = [images.render(start, min(start + FORWARD_SIZE, share.stop)) for start in share[::FORWARD_SIZE]]
        generated = torch.cat(parts) if parts else self._real_shares["train"][:0]
        return critic_estimates(critic, self._real_shares | {"generated": generated}, ranks)

    def _gan_train(self, images: ImageSet) -> dict[str, object]:
        from pipeline.evaluation.gan_train import gan_train  # it brings the command that trains classifiers

        runtime, found = self.runtime, dict[str, object]()
        with interruptible(runtime.ranks, runtime.stop.known) as poll:
            if runtime.ranks.is_main:
                found = gan_train(images, self.dataset, self._seed, runtime.device, poll)
        return runtime.ranks.broadcast(found)

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


def _kept_scores(
    path: Path, facts: dict[str, Any], extractors: Sequence[FeatureExtractor], neighbours: int
) -> dict[str, Any]:
    """What `path` already holds of what `facts` describe: "features", "critic", "gan_train". Scores in the spaces of
    `extractors` must be by the same ones, and of as many neighbours."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        kept = {key: dict(before[key]) for key in ("features", "critic", "gan_train") if key in before}
        pairs = [(key, before.get(key), value) for key, value in facts.items() if key != "target"]
        for extractor in extractors:
            if scores := kept["features"].get(extractor.name):
                known = scores["provenance"]
                pairs.append((extractor.name, known["extractor"], extractor.fingerprint))
                pairs.append(("evaluation.neighbours", known.get("neighbours", USUAL_NEIGHBOURS), neighbours))
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
