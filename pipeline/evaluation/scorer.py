"""Scores images in a job of any number of processes, and writes the result into a file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.data.resident import load_images
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor, load_all, published_weights
from pipeline.evaluation.interruption import check_interrupted, interruptible, interruptible_on_main
from pipeline.evaluation.real_statistics import class_sizes
from pipeline.export.generator_file import fingerprint
from pipeline.export.images import render_range, save_grid
from pipeline.models.networks import AnyGenerator, Critic
from pipeline.reporting import few_images
from pipeline.reporting.read import USUAL_NEIGHBOURS
from pipeline.rng import evaluation_labels, seeded
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import neighbours, real_images

EARLIER = "all equally often"
"""How earlier versions asked generators for classes, which their files of scores do not say."""


class Scorer:
    """Scores images with one configuration, one dataset and one seed of the evaluation images.

    Building it loads the feature extractors, so that a training is refused where it could not be evaluated: UserError
    for a feature space that is unknown or does not fit the dataset, and for missing weights.
    """

    _warned = False

    def __init__(self, config: EvaluationConfig, dataset: Dataset, runtime: Runtime, seed: int) -> None:
        self.config, self.dataset, self.runtime, self.seed = config, dataset, runtime, seed
        for name in config.features:
            if weights := published_weights(name):
                runtime.ranks.on_main(partial(weights.fetch, config))
        self.extractors = load_all(config, dataset, runtime.device)
        for warning in filter(None, (extractor.warning for extractor in self.extractors)):
            runtime.print(warning)
        self._real_shares: dict[str, Tensor] = {}

    def score_generator(
        self, generator: AnyGenerator, path: Path, facts: dict[str, Any], critic: nn.Module | None = None
    ) -> dict[str, Any]:
        """Scores the evaluation images 0, ..., num_images - 1 of a generator in eval mode: see `score`. Of the
        dataset's classes each has the share that it has in the reference split; other classes take turns."""
        check_shape(generator.image_shape, self.dataset)
        count, facts = self.config.num_images, facts | {"images_fingerprint": fingerprint(generator)}
        sizes = self._class_sizes(generator) if generator.num_classes else []
        labels = evaluation_labels(0, count, sizes) if sizes else None
        if len({*sizes}) > 1:  # or it is as in earlier versions
            facts["classes"] = f"as often as in {self.config.reference}"
        images = ImageSet(count, partial(render_range, generator, self.seed, sizes=sizes), labels)
        return self.score(images, path, facts, critic)

    def _class_sizes(self, generator: AnyGenerator) -> list[int]:
        """Returns how many images of the reference split each class has, or equal numbers for classes that are not the
        dataset's."""
        dataset = self.dataset
        is_other = generator.class_names not in ((), dataset.class_names)  # files of earlier versions have no names
        if generator.num_classes != dataset.num_classes or is_other:
            return [1] * generator.num_classes
        ranks, interrupted = self.runtime.ranks, self.runtime.stop.known
        return class_sizes(dataset, self.config.reference, self.extractors[0], ranks, interrupted)

    def score(
        self, images: ImageSet, path: Path, facts: dict[str, Any], critic: nn.Module | None = None
    ) -> dict[str, Any]:
        """Scores images into the JSON file `path`, and draws pictures beside it: some real images, and
        `neighbours-....png`, the first images with the training images nearest to them in the first feature space.
        Scores that `path` holds already of the same images, measured in the same way, stay in it.

        Args:
            facts: Which images they are: "images_fingerprint" of their content, and others. Only "target" may differ
                from what the file has.
            critic: The critic of the same checkpoint, trained on this dataset and on the runtime's device; its
                `critic_estimates` become "critic"; a network of the user's own has none. With evaluation.gan_train the
                file gets "gan_train" as well.

        Returns:
            What was written, on every rank.

        Raises:
            UserError: Before anything is computed: `path` holds scores of other images or measured in another way, or
                evaluation.gan_train is true for images without classes.
            Preempted: A signal came.
            OSError: The main rank could not write the scores.
        """
        from pipeline.evaluation.evaluate import evaluate_images  # here, and so below: it imports torchvision

        config, ranks, dataset, interrupted = self.config, self.runtime.ranks, self.dataset, self.runtime.stop.known
        if config.gan_train and (images.labels is None or not dataset.num_classes):
            raise UserError("evaluation.gan_train is true, but the images were asked for no classes: set it to false")
        facts = facts | {"num_images": images.num_images, "reference": config.reference, "seed": self.seed}
        facts |= {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
        content = ranks.on_main(lambda: _scores_in(path, facts, self.extractors, config.neighbours))
        if (warning := few_images(images.num_images, dataset.num_images(config.reference))) and not self._warned:
            self.runtime.print(warning)
            self._warned = True
        scores = evaluate_images(
            images, dataset, self.extractors, config, seed=self.seed, ranks=ranks, interrupted=interrupted
        )
        if isinstance(critic, Critic) and {"train", "test"} <= dataset.splits.keys():
            content["critic"] = self._critic_estimates(critic, images)
        if config.gan_train:
            from pipeline.evaluation.train_classifier import gan_train

            content["gan_train"] = interruptible_on_main(
                ranks, interrupted, lambda: gan_train(images, dataset, self.seed, self.runtime.device)
            )
        content["features"] = content.get("features", {}) | scores
        result = facts | ({"warning": warning} if warning else {}) | content
        # The main rank may meet a damaged shard, which ends all ranks.
        nearest = scores[self.extractors[0].name]["nearest_training_images"]
        interruptible_on_main(ranks, interrupted, lambda: self._write(result, nearest, images, path))
        return result

    def _critic_estimates(self, critic: Critic, images: ImageSet) -> dict[str, object]:
        from pipeline.evaluation.evaluate import MOST_SCORED_BY_CRITIC, critic_estimates, share_of_real_images

        ranks = self.runtime.ranks
        share = ranks.share(min(images.num_images, MOST_SCORED_BY_CRITIC), FORWARD_SIZE)
        with interruptible(ranks, self.runtime.stop.known):
            for split in ("train", "test"):
                check_interrupted()
                if split not in self._real_shares:  # once a run
                    self._real_shares[split] = share_of_real_images(self.dataset, split, ranks)
            parts = [images.render(start, min(start + FORWARD_SIZE, share.stop)) for start in share[::FORWARD_SIZE]]
        generated = torch.cat(parts) if parts else self._real_shares["train"][:0]
        return critic_estimates(critic, self._real_shares | {"generated": generated}, ranks)

    def _write(self, result: dict[str, Any], nearest: Any, images: ImageSet, path: Path) -> None:
        """Writes the scores and the pictures: a grid of real images, like one of samples, only once in a folder."""
        grid, split = real_images(path, self.dataset.fingerprint), self.config.reference
        rows, columns = (4, 4) if images.labels is None else (min(10, self.dataset.num_classes or 10), 10)
        if not grid.exists():
            draws = seeded(self.seed, "real images shown")
            indices = torch.randint(self.dataset.num_images(split), (rows * columns,), generator=draws)
            save_grid(load_images(self.dataset, split, indices), grid, columns)
        write_text(path, json.dumps(result, indent=1))
        indices = torch.tensor(nearest["indices"])
        shown, real = images.render(0, len(indices)), load_images(self.dataset, "train", indices.flatten())
        beside = torch.cat([shown.unsqueeze(1), real.view(*indices.shape, *shown.shape[1:])], dim=1)
        save_grid(beside.flatten(0, 1), neighbours(path), columns=beside.shape[1])


def check_shape(shape: Sequence[int], dataset: Dataset) -> None:
    """Raises UserError if a generator's images, of this shape (C, H, W), are not like the dataset's."""
    if tuple(shape) != dataset.image_shape:
        raise UserError(
            f"the generator makes images of {' x '.join(map(str, shape))}, the dataset {dataset.name} has "
            f"{' x '.join(map(str, dataset.image_shape))}: they cannot be compared"
        )


def _scores_in(
    path: Path, facts: dict[str, Any], extractors: Sequence[FeatureExtractor], neighbours: int
) -> dict[str, Any]:
    """Returns what `path` holds of the images that `facts` describe: "features", "critic", "gan_train", and the
    "timing" of a training. Raises UserError if these are of other images, extractors or numbers of neighbours."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        content = {key: dict(before[key]) for key in ("features", "critic", "gan_train", "timing") if key in before}
        before.setdefault("classes", EARLIER)
        pairs = [(key, before.get(key), value) for key, value in facts.items() if key != "target"]
        for extractor in extractors:
            if scores := content["features"].get(extractor.name):
                known = scores["provenance"]
                pairs.append((extractor.name, known["extractor"], extractor.fingerprint))
                pairs.append(("evaluation.neighbours", known.get("neighbours", USUAL_NEIGHBOURS), neighbours))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error}): delete it") from None
    if differing := [f"{key} is {_shown(old)} there and {_shown(new)} here" for key, old, new in pairs if old != new]:
        of = f", of {before['target']}," if before.get("target", facts.get("target")) != facts.get("target") else ""
        raise UserError(f"{path}: holds other scores{of} ({'; '.join(differing)}): name another file with --out")
    return content


def _shown(value: object) -> str:
    """Returns a fact as a message shows it: fingerprints are shortened."""
    if value is None:
        return "not given"
    return f"{value:.12}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
