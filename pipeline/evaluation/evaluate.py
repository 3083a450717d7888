"""Scores of N images, computed by all ranks together and equal for any number of them.

Each rank adds its share of the images to the states; the main rank computes the scores from the states of all. What
takes features themselves (metrics/states.py's samples) has the same ones in the same order, so its scores are equal in
every bit; FID and what else comes of sums differs by their rounding (1e-12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from typing import Any

import torch
from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features, interruptible, never
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.metrics.classes import class_scores, fid_per_class
from pipeline.evaluation.metrics.frechet import FrechetReference, Moments, frechet_extrapolated, frechet_interval
from pipeline.evaluation.metrics.inception_score import inception_score
from pipeline.evaluation.metrics.manifold import nearest_neighbours, squared_radii
from pipeline.evaluation.metrics.metric import FeatureMetric
from pipeline.evaluation.metrics.scores import KEEP, SAMPLE_SCORES, Options
from pipeline.evaluation.metrics.states import ClassSums, Poll, Sample, Sums
from pipeline.evaluation.real_statistics import RealStatistics, real_scores, real_statistics

SHOWN_IMAGES, SHOWN_NEIGHBOURS = 8, 5
"""Images whose nearest training images are told, and how many of these."""
DEFAULTS = EvaluationConfig()

Scores = dict[str, object]


def evaluate_images(
    images: ImageSet,
    dataset: Dataset,
    extractors: Sequence[FeatureExtractor],
    config: EvaluationConfig = DEFAULTS,
    *,
    seed: int = 0,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = never,
) -> dict[str, Scores]:
    """Scores images in every feature space, in one pass over them.

    Args:
        config: its `reference` is the real split to compare with. As many images of the other one give the floor:
            always the same ones for a number, and as many as there are (or are kept, see real_statistics.py) where
            those are fewer. `batch_size` images are rendered at once, rounded up to a multiple of 100: networks round
            differently in forward passes of 7 and of 100 images, so features are always computed in the same blocks of
            100. `neighbours` is the k of precision and what is like it.
        seed: of the random choices inside the scores (subsets, splits, groups, projections).
        interrupted: asked before each batch and between scores whether to give up; ranks may disagree for a while.

    Returns on every rank, for each extractor's name:
        "fid", "fid_floor" (null without another split), "fid_interval" [low, high] (95 %, for the mean FID of as many
        images of this generator, not of infinitely many), "fid_infinite" (null with too few images), "is_mean",
        "is_std", "kid_mean", "kid_std", "precision", "recall", "density", "coverage", "sliced_wasserstein" and its
        "..._floor", "authenticity" among the training images and "authenticity_real", that of other real ones;
        where the logits stand for the dataset's classes also "class_histogram" and "class_histogram_real" (share of
        each class by the classifier's verdict on either side), "class_total_variation", "confidence_mean",
        "fid_per_class" (null for a class with too few images), "fid_per_class_floor" (of all of the other split)
        and, with labels, "class_accuracy" (GAN-test): the rate at which the classifier sees the class asked for;
        "images": how many the scores are of;
        "nearest_training_images" of the first 8 images (rows of 5 "indices" in shard order and "distances");
        "provenance": what the scores depend on besides the images.
        A score that this few images do not give is null.

    Raises:
        UserError: an unknown split, or fewer than two images.
        Preempted: on every rank, when `interrupted` said so on any.
        ValueError: what is rendered, or the labels, is not what ImageSet describes.
    """
    reference = config.reference
    dataset.shards(reference)
    images = _checked(images, dataset.image_shape)
    other = next((split for split in ("train", "test") if split != reference and split in dataset.splits), None)

    def real(split: str | None, extractor: FeatureExtractor) -> RealStatistics | None:
        return real_statistics(dataset, split, extractor, ranks, interrupted) if split else None

    sides = [(real(reference, extractor), real(other, extractor)) for extractor in extractors]
    spaces = [_Space(extractor, dataset, config, seed) for extractor in extractors]
    takers = [(space.extractor, partial(space.take, images.labels)) for space in spaces]
    batch_size = -(-config.batch_size // FORWARD_SIZE) * FORWARD_SIZE
    extract_features(images, takers, batch_size, "evaluation", ranks, interrupted)
    results: dict[str, Scores] = {}
    for space, (target, floor) in zip(spaces, sides, strict=True):
        space.metric.merge(ranks)
        shown = ranks.gather_on_main(space.shown)
        with interruptible(ranks, interrupted) as poll:
            if shown is not None and target is not None:  # the main rank
                training, unseen = (target, floor) if reference == "train" else (floor, target)
                result = space.scores(target, floor, training, unseen, poll)
                if training:
                    result["nearest_training_images"] = _nearest(torch.cat(shown), training)
                result["provenance"] = {
                    "extractor": space.extractor.fingerprint,
                    "dataset": dataset.fingerprint,
                    "reference": reference,
                    "reference_images": target.num_images,
                    "seed": seed,
                    "neighbours": config.neighbours,
                    **space.extractor.facts,
                }
                results[space.extractor.name] = result
    return ranks.broadcast(results)


def _checked(images: ImageSet, image_shape: tuple[int, int, int]) -> ImageSet:
    """The same images, refused as soon as they are not what they should be."""
    if images.num_images < 2:
        raise UserError(f"evaluation.num_images is {images.num_images}: scores need at least 2 images")
    if images.labels is not None and images.labels.shape != (images.num_images,):
        raise ValueError(f"labels have shape {tuple(images.labels.shape)}, expected ({images.num_images},)")

    def render(start: int, stop: int) -> Tensor:
        rendered, shape = images.render(start, stop), (stop - start, *image_shape)
        if rendered.dtype != torch.uint8 or rendered.shape != shape:
            raise ValueError(
                f"render({start}, {stop}) gave {rendered.dtype} {tuple(rendered.shape)}, expected torch.uint8 {shape}"
            )
        return rendered

    return replace(images, render=render)


class _Space:
    """The scores of one feature space. One more of a sample of features is a line in SAMPLE_SCORES."""

    def __init__(self, extractor: FeatureExtractor, dataset: Dataset, config: EvaluationConfig, seed: int) -> None:
        self.extractor, self.dataset, self.config, self.seed = extractor, dataset, config, seed
        width, states = extractor.num_features, dict[str, Any]()
        states |= {"sums": Sums(width), "sample": Sample(width, KEEP)}
        if extractor.num_classes:
            states["logits"] = Sample(extractor.num_classes, KEEP, "logits")
        if dataset.class_names and dataset.class_names == extractor.class_names:
            states["classes"] = ClassSums(width, extractor.num_classes)
        self.metric = FeatureMetric(states)
        self.shown = torch.empty(0, width)
        """Features of this rank's images among the first SHOWN_IMAGES."""

    def take(self, labels: Tensor | None, features: Tensor, logits: Tensor, indices: Tensor) -> None:
        """Adds images to the states."""
        self.metric.update(features, False, indices, logits, None if labels is None else labels[indices])
        self.shown = torch.cat([self.shown, features[indices < SHOWN_IMAGES]])

    def scores(
        self,
        target: RealStatistics,
        floor: RealStatistics | None,
        training: RealStatistics | None,
        unseen: RealStatistics | None,
        poll: Poll,
    ) -> Scores:
        """Computes the scores on the main rank, with the states of all. `training` and `unseen` are the same two splits
        as `target` and `floor`, by what the generator has seen of them."""
        fake, how = self.metric.fake, Options(self.seed, self.config.neighbours, poll, partial(self._radii, poll))
        rows, _ = fake["sample"].first()
        count, reference = int(fake["sums"].state()["count"]), FrechetReference(Moments.of_sums(target.moments))
        fid = reference.distance(Moments.of_sums(fake["sums"].state()))
        at_floor = floor.moments_of(count) if floor else None
        numbers: dict[str, object] = {"fid": [count, target.num_images], "fid_infinite": [len(rows), target.num_images]}
        numbers["fid_floor"] = at_floor.num_images if at_floor else None
        result: Scores = {"fid": fid, "fid_floor": reference.distance(at_floor) if at_floor else None}
        result["fid_interval"] = frechet_interval(rows, count, fid, reference, self.seed, poll)
        result["fid_infinite"] = frechet_extrapolated(rows, count, fid, reference, self.seed, poll)
        result |= {"is_mean": None, "is_std": None}  # without classes
        if "logits" in fake:
            poll()
            logits, _ = fake["logits"].first()
            result["is_mean"], result["is_std"] = inception_score(logits, self.seed)
            numbers["inception_score"] = [len(logits), 0]
        if "classes" in fake:
            result |= self._plain(class_scores(fake["classes"].state(), target.classes, poll))
        reals = {name: training if score.against_training else target for name, score in SAMPLE_SCORES.items()}
        for name, score in SAMPLE_SCORES.items():
            poll()
            scores, numbers[name] = score(fake["sample"], self._sample(reals[name]), how)
            result |= self._plain(scores)

        def controls() -> dict[str, Scores]:
            """The same scores of as many real images in the place of the generated ones."""
            found: Scores = {"sliced_wasserstein_floor": None, "authenticity_real": None}
            used: dict[str, object] = {}
            for key, real in zip(found, (floor, unseen), strict=True):
                if real:
                    name = key.rpartition("_")[0]
                    own = Sample.of_state(real.sample_of(count), KEEP)
                    scores, numbers = SAMPLE_SCORES[name](own, self._sample(reals[name]), how)
                    found[key], used[key] = self._plain(scores)[name], numbers[0]
            if floor and "classes" in fake:
                distances = {"fid_per_class_floor": fid_per_class(floor.classes, target.classes, poll)}
                found, used["fid_per_class_floor"] = found | self._plain(distances), floor.num_images
            return {"scores": found, "images": used}

        facts = {"controls": count, "reference": self.config.reference, "seed": self.seed}
        of_real: dict[str, Scores] = real_scores(self.dataset, self.extractor, facts, controls)
        return result | of_real["scores"] | {"images": numbers | of_real["images"]}

    def _sample(self, real: RealStatistics | None) -> Sample:
        return Sample.of_state(real.sample, KEEP) if real else Sample(self.extractor.num_features, KEEP)

    def _radii(self, poll: Poll, real: Tensor) -> Tensor:
        """Returns the `squared_radii` of a sample of the reference, which its size determines."""
        neighbours = self.config.neighbours
        facts = {"radii": len(real), "reference": self.config.reference, "neighbours": neighbours}
        squares = partial(squared_radii, real, neighbours, poll)
        kept = real_scores(self.dataset, self.extractor, facts, lambda: {"squares": squares().tolist()})
        return torch.tensor(kept["squares"], dtype=torch.float64)

    def _plain(self, scores: Mapping[str, float | Tensor]) -> Scores:
        """Returns numbers, or one for each class; null where there is none."""

        def plain(score: float | Tensor) -> object:
            if isinstance(score, Tensor) and score.ndim:
                return dict(zip(self.dataset.class_names, map(plain, score), strict=True))
            return None if isnan(score) else float(score)

        return {name: plain(score) for name, score in scores.items()}


def _nearest(features: Tensor, training: RealStatistics) -> dict[str, object]:
    among, indices = training.sample["rows"], training.sample["indices"]
    nearest, distances = nearest_neighbours(features, among, SHOWN_NEIGHBOURS)
    return {"indices": indices[nearest].tolist(), "distances": distances.tolist(), "among": len(among)}
