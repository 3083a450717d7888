"""Scores of N images, computed by all ranks together and equal for any number of them.

Every rank renders and extracts the features of a contiguous share of the images; the features are gathered in image
order and scored in float64 on rank 0. Nothing is summed in an order that depends on the world size, and forward passes
hold the same images whatever the world size, so the scores do not depend on it in a single bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.data.manifest import Dataset
from pipeline.errors import UserError
from pipeline.metrics import scores
from pipeline.metrics.cache import (
    Interrupted,
    RealFeatures,
    broadcast,
    gather,
    raise_if_any,
    real_features,
    share,
    stacked,
)
from pipeline.metrics.features import FORWARD_SIZE, FeatureExtractor
from pipeline.rng import seeded

MANIFOLD_IMAGES = 10_000
"""Most images of either side in precision, recall, density and coverage, whose cost grows with their product."""

SHOWN_IMAGES = 8
"""Images whose nearest training images are told."""

Scores = dict[str, object]


def evaluate_images(
    render: Callable[[int, int], Tensor],
    num_images: int,
    dataset: Dataset,
    extractors: Sequence[FeatureExtractor],
    *,
    reference: str = "train",
    batch_size: int = 500,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
    labels: Tensor | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Scores]:
    """Scores images 0, ..., num_images - 1 in every feature space, in one pass over them.

    Args:
        render: (start, stop) -> these images, uint8 [stop - start, C, H, W]. Image i must depend on i alone.
        reference: the real split to compare with. The other one, as a sample of real images, gives the floor.
        batch_size: images to ask of `render` at once, rounded up to a multiple of 100. Networks round differently in
            forward passes of 7 and of 100 images, so features are always computed in the same blocks of 100.
        seed: of the random choices inside the scores (subsets, splits, groups).
        rank, world_size: with more than one rank, the default process group must exist (gloo or NCCL). Shares are cut
            at multiples of the batch size, so they may differ by one batch and be empty.
        progress: called with the number of images after each batch of this rank (`tqdm.update`).
        labels: int64 [num_images], the classes that the images were asked to show.
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
        Interrupted: on every rank, when `interrupted` said so on any.
        ValueError: `render` or `labels` is not what is described above.
    """
    dataset.shards(reference)
    if num_images < 2:
        raise UserError(f"evaluation.num_images is {num_images}: scores need at least 2 images")
    if labels is not None and labels.shape != (num_images,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected ({num_images},)")
    floor_split = next((split for split in ("train", "test") if split != reference and split in dataset.splits), None)
    real: list[tuple[RealFeatures | None, RealFeatures | None]] = []
    for extractor in extractors:
        splits = [
            real_features(dataset, split, extractor, rank=rank, world_size=world_size, interrupted=interrupted)
            if split
            else None
            for split in (reference, floor_split)
        ]
        real.append((splits[0], splits[1]))

    unit = -(-batch_size // FORWARD_SIZE) * FORWARD_SIZE
    first, last = share(num_images, unit, rank, world_size)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in extractors]
    stopping = False
    for start in range(first, last, unit):
        if stopping := interrupted():
            break
        stop = min(start + unit, last)
        images = render(start, stop)
        if images.dtype != torch.uint8 or images.shape != (stop - start, *dataset.image_shape):
            raise ValueError(
                f"render({start}, {stop}) gave {images.dtype} {tuple(images.shape)}, "
                f"expected torch.uint8 {(stop - start, *dataset.image_shape)}"
            )
        for extractor, found in zip(extractors, parts, strict=True):
            found.append(extractor(images))
        if progress is not None:
            progress(stop - start)
    raise_if_any(stopping, world_size)

    def poll() -> None:
        if interrupted():
            raise Interrupted

    results: dict[str, Scores] = {}
    for extractor, found, (target, floor) in zip(extractors, parts, real, strict=True):
        fake = gather(stacked(found, extractor), rank, world_size)
        if fake is not None and target is not None:
            try:
                result = _score(fake, target, floor, extractor, dataset, seed, labels, poll)
            except Interrupted:
                stopping = True
        raise_if_any(stopping, world_size)
        if fake is not None and target is not None:
            if training := target if reference == "train" else floor:
                result["nearest_training_images"] = _nearest(fake[0][:SHOWN_IMAGES], training.features)
            result["provenance"] = {
                "extractor": extractor.fingerprint,
                "dataset": dataset.fingerprint,
                "reference": reference,
                "reference_images": len(target.features),
                "seed": seed,
            }
            results[extractor.name] = result
    return broadcast(results, world_size)


def _score(
    fake: tuple[Tensor, Tensor],
    real: RealFeatures,
    floor: RealFeatures | None,
    extractor: FeatureExtractor,
    dataset: Dataset,
    seed: int,
    labels: Tensor | None,
    poll: Callable[[], None],
) -> Scores:
    """All scores of features [n, d] and logits [n, k]."""
    features, logits = fake
    poll()
    is_mean, is_std = scores.inception_score(logits, seed)
    poll()
    kid_mean, kid_std = scores.kernel_distance(features, real.features, seed)
    result: Scores = {
        "fid": scores.frechet_distance(scores.moments(features), real.moments),
        "fid_floor": scores.frechet_distance(floor.moments, real.moments) if floor else None,
        "fid_interval": scores.frechet_interval(features, real.moments, seed, poll),
        "is_mean": is_mean,
        "is_std": is_std,
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        **_manifold(features, real.features, seed, poll),
    }
    if dataset.class_names and dataset.class_names == extractor.class_names:
        result |= _class_scores(features, logits, real, dataset.class_names, labels)
    return result


def _nearest(features: Tensor, training: Tensor) -> dict[str, object]:
    indices, distances = scores.nearest_neighbours(features, training, scores.NEIGHBOURS)
    return {"indices": indices.tolist(), "distances": distances.tolist()}


def _manifold(fake: Tensor, real: Tensor, seed: int, poll: Callable[[], None]) -> dict[str, float | None]:
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
