"""Scores of N images, computed by all ranks together and equal for any number of them.

Each rank adds its share of the images to the metrics; the main rank computes the scores from the states of all. What
takes features themselves (metrics/base.py's samples) has the same ones in the same order, so its scores are equal in
every bit; FID and what else comes of sums differs by their rounding (1e-12).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from pipeline.config import EvaluationConfig
from pipeline.data.manifest import Dataset
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features, interruptible, never
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.metrics import (
    Authenticity,
    ClassScores,
    ExtrapolatedFrechetDistance,
    InceptionScore,
    KernelDistance,
    ManifoldScores,
    SlicedWasserstein,
)
from pipeline.evaluation.metrics.base import FeatureMetric, Poll, SampleMetric
from pipeline.evaluation.metrics.frechet import FrechetReference, Moments, frechet_interval
from pipeline.evaluation.metrics.manifold import nearest_neighbours, squared_radii
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
        for metric in space.fed.values():
            metric.merge(ranks)
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


REAL_SIDES = {
    "fid": "moments",
    "classes": "classes",
    **dict.fromkeys(("kid", "manifold", "sliced_wasserstein", "authenticity"), "sample"),
}
"""Field of RealStatistics that a metric's real side is."""


class _Space:
    """The scores of one feature space. Another score is a metric here and, for its real side, a line in REAL_SIDES."""

    def __init__(self, extractor: FeatureExtractor, dataset: Dataset, config: EvaluationConfig, seed: int) -> None:
        self.extractor, self.seed, self.dataset, self.reference = extractor, seed, dataset, config.reference
        width, alone = extractor.num_features, {"sync_on_compute": False}  # see `merge`
        self.fid = ExtrapolatedFrechetDistance(width, seed=seed, **alone)
        self.fed: dict[str, FeatureMetric] = {"fid": self.fid}
        """What images go into, batch by batch."""
        if extractor.num_classes:
            self.fed["inception_score"] = InceptionScore(extractor.num_classes, seed=seed, **alone)
        if dataset.class_names and dataset.class_names == extractor.class_names:
            self.fed["classes"] = ClassScores(width, extractor.num_classes, **alone)
        manifold = ManifoldScores(width, neighbours=config.neighbours, **alone)
        self.of_sample: dict[str, SampleMetric] = {
            "kid": KernelDistance(width, seed=seed, **alone),
            "manifold": manifold,
            "sliced_wasserstein": SlicedWasserstein(width, seed=seed, **alone),
            "authenticity": Authenticity(width, **alone),
        }
        """What takes the sample that `fid` keeps, so that it is held once."""
        manifold.radii_of_real = partial(self._radii, manifold)
        self._collection = MetricCollection({**self.fed})
        self.shown = torch.empty(0, width)
        """Features of this rank's images among the first SHOWN_IMAGES."""

    def take(self, labels: Tensor | None, features: Tensor, logits: Tensor, indices: Tensor) -> None:
        asked = None if labels is None else labels[indices]
        self._collection.update(features=features, logits=logits, real=False, indices=indices, labels=asked)
        self.shown = torch.cat([self.shown, features[indices < SHOWN_IMAGES]])

    def scores(
        self,
        target: RealStatistics,
        floor: RealStatistics | None,
        training: RealStatistics | None,
        unseen: RealStatistics | None,
        poll: Poll,
    ) -> Scores:
        """On the main rank, with the states of all. `training` and `unseen` are the same two splits by what the
        generator has seen of them."""
        rows, indices = self.fid.sample(real=False)
        generated = {"rows": rows, "indices": indices, "seen": self.fid.fake_seen}
        result: Scores = {"is_mean": None, "is_std": None}  # without classes
        numbers: dict[str, object] = {}
        for name, metric in (self.fed | self.of_sample).items():
            poll()
            metric.poll = poll
            if name in self.of_sample:
                metric.load_side(generated, real=False)
            real = training if name == "authenticity" else target
            if real and name in REAL_SIDES:
                metric.load_side(getattr(real, REAL_SIDES[name]), real=True)
            result |= {key: self._plain(found) for key, found in metric.compute().items()}
            if isinstance(metric, SampleMetric):
                numbers["fid_infinite" if metric is self.fid else name] = metric.num_used
        reference = FrechetReference(Moments.of_sums(target.moments))
        count, fid = int(self.fid.fake_count), float(self.fid.compute()["fid"])
        at_floor = floor.moments_of(count) if floor else None
        numbers |= {"fid": [count, target.num_images], "fid_floor": at_floor.num_images if at_floor else None}
        result["fid_floor"] = reference.distance(at_floor) if at_floor else None
        result["fid_interval"] = frechet_interval(rows, count, fid, reference, self.seed, poll)
        facts = {"controls": count, "reference": self.reference, "seed": self.seed}
        compute = partial(self._controls, floor, unseen, count)
        controls: dict[str, Scores] = real_scores(self.dataset, self.extractor, facts, compute)
        return result | controls["scores"] | {"images": numbers | controls["images"]}

    def _radii(self, manifold: ManifoldScores, real: Tensor) -> Tensor:
        """The `squared_radii` of a sample of the reference, which its size determines."""
        facts = {"radii": len(real), "reference": self.reference, "neighbours": manifold.neighbours}
        squares = partial(squared_radii, real, manifold.neighbours, manifold.poll)
        kept = real_scores(self.dataset, self.extractor, facts, lambda: {"squares": squares().tolist()})
        return torch.tensor(kept["squares"], dtype=torch.float64)

    def _controls(self, floor: RealStatistics | None, unseen: RealStatistics | None, count: int) -> dict[str, Scores]:
        """The same "scores" of as many real "images", which take the place of the generated ones: this comes last."""
        found: Scores = {"sliced_wasserstein_floor": None, "authenticity_real": None}
        numbers: dict[str, object] = {}
        for key, real in zip(found, (floor, unseen), strict=True):
            if real:
                metric = self.of_sample[key.rpartition("_")[0]]
                metric.load_side(real.sample_of(count), real=False)
                (score,) = metric.compute().values()
                found[key], numbers[key] = self._plain(score), metric.num_used[0]
        if floor and (classes := self.fed.get("classes")):
            classes.load_side(floor.classes, real=False)
            found["fid_per_class_floor"] = self._plain(classes.compute()["fid_per_class"])
            numbers["fid_per_class_floor"] = floor.num_images
        return {"scores": found, "images": numbers}

    def _plain(self, score: Tensor) -> object:
        """A number, or one for each class; null where there is none."""
        if score.ndim:
            return dict(zip(self.dataset.class_names, map(self._plain, score), strict=True))
        return None if score.isnan() else score.item()


def _nearest(features: Tensor, training: RealStatistics) -> dict[str, object]:
    among, indices = training.sample["rows"], training.sample["indices"]
    nearest, distances = nearest_neighbours(features, among, SHOWN_NEIGHBOURS)
    return {"indices": indices[nearest].tolist(), "distances": distances.tolist(), "among": len(among)}
