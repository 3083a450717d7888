"""Scores of N images, computed by all ranks together and equal for any number of them (see extract.py).

The main rank scores the gathered features in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.data.manifest import Dataset
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation import scores
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features, interruptible, never
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.real_statistics import RealFeatures, real_features
from pipeline.rng import seeded

MANIFOLD_IMAGES = 10_000
"""Most images of either side in precision, recall, density and coverage, whose cost grows with their product."""

SHOWN_IMAGES = 8
"""Images whose nearest training images are told."""

Scores = dict[str, object]


def evaluate_images(
    images: ImageSet,
    dataset: Dataset,
    extractors: Sequence[FeatureExtractor],
    *,
    reference: str = "train",
    batch_size: int = 500,
    seed: int = 0,
    ranks: Ranks = ALONE,
    interrupted: Callable[[], bool] = never,
) -> dict[str, Scores]:
    """Scores images in every feature space, in one pass over them.

    Args:
        reference: the real split to compare with. The other one, as a sample of real images, gives the floor.
        batch_size: images to render at once, rounded up to a multiple of 100. Networks round differently in forward
            passes of 7 and of 100 images, so features are always computed in the same blocks of 100.
        seed: of the random choices inside the scores (subsets, splits, groups).
        interrupted: asked before each batch and between scores whether to give up; ranks may disagree for a while.

    Returns on every rank, for each extractor's name:
        "fid", "fid_floor" (null without another split), "fid_interval" [low, high], "is_mean", "is_std", "kid_mean",
        "kid_std", "precision", "recall", "density", "coverage";
        where the logits stand for the dataset's classes also "class_histogram" and "class_histogram_real" (share of
        each class by the classifier's verdict on either side), "class_total_variation", "confidence_mean",
        "fid_per_class" (null for a class with too few images) and, with labels, "class_accuracy": the rate at
        which the classifier sees the class that was asked for;
        "nearest_training_images" of the first 8 images (rows of 5 "indices" in shard order and "distances");
        "provenance": what the scores depend on besides the images.
        A score that this few images do not give is null.

    Raises:
        UserError: an unknown split, or fewer than two images.
        Preempted: on every rank, when `interrupted` said so on any.
        ValueError: what is rendered, or the labels, is not what ImageSet describes.
    """
    dataset.shards(reference)
    images = _checked(images, dataset.image_shape)
    other = next((split for split in ("train", "test") if split != reference and split in dataset.splits), None)

    def real(split: str | None, extractor: FeatureExtractor) -> RealFeatures | None:
        return real_features(dataset, split, extractor, ranks, interrupted) if split else None

    sides = [(real(reference, extractor), real(other, extractor)) for extractor in extractors]
    batch_size = -(-batch_size // FORWARD_SIZE) * FORWARD_SIZE
    found = extract_features(images, extractors, batch_size, "evaluation", ranks, interrupted)
    results: dict[str, Scores] = {}
    for index, (extractor, (target, floor)) in enumerate(zip(extractors, sides, strict=True)):
        with interruptible(ranks, interrupted) as poll:
            if found is not None and target is not None:  # the main rank
                features, logits = found[index]
                result = _distances(features, logits, target, floor, seed, poll)
                if dataset.class_names and dataset.class_names == extractor.class_names:
                    result |= _class_scores(features, logits, target, dataset.class_names, images.labels)
                if training := target if reference == "train" else floor:
                    result["nearest_training_images"] = _nearest(features[:SHOWN_IMAGES], training.features)
                result["provenance"] = {
                    "extractor": extractor.fingerprint,
                    "dataset": dataset.fingerprint,
                    "reference": reference,
                    "reference_images": len(target.features),
                    "seed": seed,
                    **extractor.facts,
                }
                results[extractor.name] = result
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


def _distances(
    features: Tensor, logits: Tensor, real: RealFeatures, floor: RealFeatures | None, seed: int, poll: scores.Poll
) -> Scores:
    """The scores that any feature space gives, of features [n, d] and logits [n, k]."""
    poll()
    is_mean, is_std = scores.inception_score(logits, seed) if logits.shape[1] else (None, None)
    poll()
    kid_mean, kid_std = scores.kernel_distance(features, real.features, seed)
    return {
        "fid": scores.frechet_distance(scores.moments(features), real.moments),
        "fid_floor": scores.frechet_distance(floor.moments, real.moments) if floor else None,
        "fid_interval": scores.frechet_interval(features, real.moments, seed, poll),
        "is_mean": is_mean,
        "is_std": is_std,
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        **_manifold(features, real.features, seed, poll),
    }


def _manifold(fake: Tensor, real: Tensor, seed: int, poll: scores.Poll) -> dict[str, float | None]:
    """As many images of either side, so that scores of different evaluations of N images compare."""
    count = min(len(fake), len(real), MANIFOLD_IMAGES)
    if count <= scores.NEIGHBOURS:
        return dict.fromkeys(("precision", "recall", "density", "coverage"))

    def chosen(name: str, features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=seeded(seed, f"manifold {name}"))[:count]]

    return {**scores.manifold_scores(chosen("fake", fake), chosen("real", real), poll)}


def _class_scores(
    features: Tensor, logits: Tensor, real: RealFeatures, class_names: tuple[str, ...], labels: Tensor | None
) -> Scores:
    """Both sides are classed by the classifier, so that its mistakes do not count against the images."""
    classes, real_classes = logits.argmax(1), real.logits.argmax(1)
    shares, real_shares = (scores.class_shares(found, len(class_names)) for found in (classes, real_classes))
    per_class = scores.class_frechet_distances(features, classes, real.features, real_classes, len(class_names))
    result: Scores = {
        "class_histogram": dict(zip(class_names, shares.tolist(), strict=True)),
        "class_histogram_real": dict(zip(class_names, real_shares.tolist(), strict=True)),
        "class_total_variation": scores.total_variation(shares, real_shares),
        "confidence_mean": logits.double().softmax(1).amax(1).mean().item(),
        "fid_per_class": dict(zip(class_names, per_class, strict=True)),
    }
    if labels is not None:
        result["class_accuracy"] = (classes == labels.cpu()).double().mean().item()
    return result


def _nearest(features: Tensor, training: Tensor) -> dict[str, object]:
    indices, distances = scores.nearest_neighbours(features, training, scores.NEIGHBOURS)
    return {"indices": indices.tolist(), "distances": distances.tolist()}
