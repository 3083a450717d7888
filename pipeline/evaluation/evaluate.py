"""Scores of N images, which all ranks compute together and which are equal for any number of ranks.

Each rank adds its share of the images to states, the states of all ranks are joined, and the main rank computes the
scores from them. Samples are the same in every bit, and so are scores of samples; FID and other scores of sums differ
by the rounding of the sums (1e-12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan

import torch
from torch import Tensor

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.data.resident import load_images
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation.extract import ALONE, ImageSet, extract_features
from pipeline.evaluation.features import FORWARD_SIZE, FeatureExtractor
from pipeline.evaluation.interruption import check_interrupted, interruptible_on_main, never
from pipeline.evaluation.metrics.frechet import Moments, frechet_distance, frechet_extrapolated, frechet_interval
from pipeline.evaluation.metrics.neighbours import nearest_neighbours, squared_radii
from pipeline.evaluation.metrics.scores import KEEP, SAMPLE_SCORES, ClassScore, Options, class_floors, class_scores
from pipeline.evaluation.metrics.states import Batch, ClassSums, Sample, States, Sums, add, gather
from pipeline.evaluation.real_statistics import RealStatistics, real_scores, real_statistics
from pipeline.models.networks import Critic
from pipeline.rng import sampling_order

SHOWN_IMAGES, SHOWN_NEIGHBOURS = 8, 5  # images whose nearest training images are named, and how many of these
MOST_SCORED_BY_CRITIC = 2_000  # images of each kind: 228 GFLOP of the reference's critic for all three kinds
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
    """Scores images in every feature space, in one pass over them. Every rank must call it.

    Args:
        config: `reference` is the real split to compare with. The other split gives the floors, from as many images as
            are scored, or all if there are fewer. `batch_size` images are rendered at once, rounded up to a multiple of
            100: features are always computed in the same blocks of 100, since networks round differently in forward
            passes of 7 and of 100 images.
        seed: The seed of random choices inside the scores (subsets, splits, parts, projections).
        interrupted: See `interruptible`.

    Returns:
        On every rank, for the name of each extractor: the scores, null where this few images do not give them;
        "images", how many generated and real images each is of; "nearest_training_images" of the first 8 images, rows
        of 5 "indices" in shard order and "distances"; and "provenance", what they depend on besides the images.
        Scores are those of FID, of SAMPLE_SCORES and, if the logits are of the dataset's classes, of `class_scores`, by
        class name; "..._floor" and "authenticity_real" are those of real images in the place of the generated ones.

    Raises:
        UserError: The split is unknown, or there are fewer than two images.
        Preempted: On every rank, if `interrupted` returned true on any.
        ValueError: Rendered images, or the labels, are not what ImageSet describes.
    """
    if images.num_images < 2:
        raise UserError(f"evaluation.num_images is {images.num_images}: scores need at least 2 images")
    if images.labels is not None and images.labels.shape != (images.num_images,):
        raise ValueError(f"labels have shape {tuple(images.labels.shape)}, expected ({images.num_images},)")
    dataset.shards(config.reference)
    splits = [split for split in ("train", "test") if split in dataset.splits]
    spaces = []
    for extractor in extractors:
        real = {split: real_statistics(dataset, split, extractor, ranks, interrupted) for split in splits}
        spaces.append(
            _Space(extractor, dataset, config, seed, {split: known for split, known in real.items() if known})
        )
    consumers = [(space.extractor, partial(space.add, images.labels)) for space in spaces]
    batch_size = -(-config.batch_size // FORWARD_SIZE) * FORWARD_SIZE
    extract_features(images, consumers, batch_size, "evaluation", ranks, interrupted)
    results: dict[str, Scores] = {}
    for space in spaces:
        gather(space.states, ranks)
        work = partial(space.scores, torch.cat(ranks.gather(space.shown)))
        results[space.extractor.name] = interruptible_on_main(ranks, interrupted, work)
    return results


class _Space:
    """One feature space: the states of the generated images and, on the main rank, where `real` has the statistics of
    the splits, the scores that they give."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        dataset: Dataset,
        config: EvaluationConfig,
        seed: int,
        real: Mapping[str, RealStatistics],
    ) -> None:
        self.extractor, self.dataset, self.config, self.seed, self.real = extractor, dataset, config, seed, real
        self.floor = real.get("test" if config.reference == "train" else "train")
        self.options = Options(seed, config.neighbours, self._radii)
        width, num_classes = extractor.num_features, extractor.num_classes
        self.states: States = {"sums": Sums(width), "features": Sample(width, KEEP)}
        if num_classes:
            self.states["logits"] = Sample(num_classes, KEEP, "logits")
        if dataset.class_names and dataset.class_names == extractor.class_names:
            self.states["classes"] = ClassSums(width, num_classes)
        self.shown = torch.empty(0, width)  # features of this rank's images among the first SHOWN_IMAGES

    def add(self, labels: Tensor | None, features: Tensor, logits: Tensor, indices: Tensor) -> None:
        """Adds images to the states."""
        add(self.states, Batch(features, logits, indices, None if labels is None else labels[indices]))
        self.shown = torch.cat([self.shown, features[indices < SHOWN_IMAGES]])

    def scores(self, shown: Tensor) -> Scores:
        """Computes the scores from the states of all ranks, and the neighbours of the features `shown`."""
        target, states = self.real[self.config.reference], self.states
        ours, reference, rows = Moments.of_sums(states["sums"].tensors), target.moments, states["features"].first()[0]
        count, real = ours.num_images, self.floor.moments_of(ours.num_images) if self.floor else None
        fid = frechet_distance(ours, reference)
        scores: Scores = {
            "fid": fid,
            "fid_floor": frechet_distance(real, reference) if real else None,
            "fid_interval": frechet_interval(rows, count, fid, reference, self.seed),
            "fid_infinite": frechet_extrapolated(rows, count, fid, reference, self.seed),
        }
        if self.extractor.published:
            scores["fid_published"] = frechet_distance(ours, self.extractor.published)
        images: Scores = {"fid": [count, target.num_images], "fid_floor": real.num_images if real else None}
        images["fid_infinite"] = [len(rows), target.num_images]
        for name, score in SAMPLE_SCORES.items():
            scores |= dict.fromkeys(score.names)  # null, without logits
            if score.rows in states:
                values, images[name] = self._of_sample(name, states[score.rows])
                scores |= values
        if "classes" in states:
            scores |= self._plain(class_scores(states["classes"].tensors, target.classes))
        facts = {"floors": count, "reference": self.config.reference, "seed": self.seed}
        controls: dict[str, Scores] = real_scores(self.dataset, self.extractor, facts, lambda: self._controls(count))
        scores |= controls["scores"] | {"images": images | controls["images"]}
        rows, indices = self.real["train"].sample.first()
        nearest, distances = nearest_neighbours(shown, rows, SHOWN_NEIGHBOURS)
        lists = {"indices": indices[nearest].tolist(), "distances": distances.tolist(), "among": len(rows)}
        return scores | {
            "nearest_training_images": lists,
            "provenance": {
                "extractor": self.extractor.fingerprint,
                "dataset": self.dataset.fingerprint,
                "reference": self.config.reference,
                "reference_images": target.num_images,
                "seed": self.seed,
                "neighbours": self.config.neighbours,
                **self.extractor.facts,
            },
        }

    def _of_sample(self, name: str, fake: Sample, most_fake: int | None = None) -> tuple[Scores, list[int]]:
        """Computes a score of SAMPLE_SCORES, and how many generated and real images it is of."""
        check_interrupted()
        score = SAMPLE_SCORES[name]
        real = self.real["train" if score.against_training else self.config.reference]
        values, numbers = score(fake, real.sample, self.options, most_fake)
        return self._plain(values), numbers

    def _controls(self, count: int) -> dict[str, Scores]:
        """Computes scores of `count` real images in the place of the generated ones."""
        scores: Scores = {"sliced_wasserstein_floor": None, "authenticity_real": None}
        images: Scores = {}
        for key, split in zip(tuple(scores), (self.floor, self.real.get("test")), strict=True):
            if split:
                name = key.rpartition("_")[0]
                values, numbers = self._of_sample(name, split.sample, min(count, SAMPLE_SCORES[name].most_fake))
                scores[key], images[key] = values[name], numbers[0]
        if self.floor and "classes" in self.states:
            floors = class_floors(self.floor.classes, self.real[self.config.reference].classes, count, self.seed)
            images |= {"fid_per_class_floor": self.floor.num_images, "modes_floor": min(count, self.floor.num_images)}
            scores |= self._plain(floors)
        return {"scores": scores, "images": images}

    def _radii(self, real: Tensor) -> Tensor:
        """Returns the `squared_radii` of a sample of the reference, which its size determines."""
        facts = {"radii": len(real), "reference": self.config.reference, "neighbours": self.config.neighbours}
        compute = partial(squared_radii, real, self.config.neighbours)
        radii = real_scores(self.dataset, self.extractor, facts, lambda: {"squares": compute().tolist()})
        return torch.tensor(radii["squares"], dtype=torch.float64)

    def _plain(self, scores: Mapping[str, ClassScore]) -> Scores:
        """Returns scores as JSON has them: numbers, a number for each class, or intervals, and null instead of NaN."""

        def plain(score: ClassScore) -> object:
            if isinstance(score, tuple):
                return None if any(map(isnan, score)) else score
            if isinstance(score, Tensor) and score.ndim:
                return dict(zip(self.dataset.class_names, map(plain, score), strict=True))
            return None if isnan(score) else float(score)

        return {name: plain(score) for name, score in scores.items()}


def share_of_real_images(dataset: Dataset, split: str, ranks: Ranks) -> Tensor:
    """Returns this rank's share of the first MOST_SCORED_BY_CRITIC images of a split in `rng.sampling_order`: uint8
    [n, C, H, W], in shard order, so that a rank reads few shards. Raises DataError as `load_images` does."""
    chosen = sampling_order(torch.arange(dataset.num_images(split))).argsort()[:MOST_SCORED_BY_CRITIC].sort().values
    share = ranks.share(len(chosen), FORWARD_SIZE)
    return load_images(dataset, split, chosen[share.start : share.stop])


@torch.inference_mode()
def critic_estimates(critic: Critic, shares: Mapping[str, Tensor], ranks: Ranks) -> dict[str, object]:
    """Measures whether a critic knows its training images by heart, from its scores of them and of held-out real
    images. Every rank must call it, and gets the same result.

    Args:
        shares: This rank's share, which may be empty, of the images "train", "test" and "generated": uint8
            [n, C, H, W], cut at multiples of FORWARD_SIZE.

    Returns:
        "mean_scores" of each kind and how many "images" they are of; "train_gap" and "test_gap", by how much the mean
        of real images is above that of generated ones (for objectives that estimate the Wasserstein distance: the
        estimate, up to the critic's Lipschitz constant, and its held-out counterpart); "overfitting", (train - test) /
        (train - generated), 0 if the critic scores all real images alike and 1 if it takes unseen ones for generated
        (Karras et al. 2020, arXiv 2006.06676, equation 1, r_v), with the standard error "overfitting_error" of the
        difference train - test; both null without a gap.
    """
    sums = torch.zeros(len(shares), 3, dtype=torch.float64)  # of each kind: number, sum and sum of squares
    weight = next(critic.parameters())
    for row, images in zip(sums, shares.values(), strict=True):
        for part in torch.split(images, FORWARD_SIZE) if len(images) else ():
            scores, _ = critic(part.flip(2, 3).to(weight) / 255)  # the networks live mirrored
            scores = scores.double().cpu()
            row += torch.stack([torch.tensor(len(scores)).double(), scores.sum(), scores.square().sum()])
    count, total, squares = torch.stack(ranks.gather(sums)).sum(0).T
    means = total / count
    errors = ((squares / count - means.square()).clamp(min=0) / count).sqrt()
    mean, error = (dict(zip(shares, values.tolist(), strict=True)) for values in (means, errors))
    gap = mean["train"] - mean["generated"]
    return {
        "mean_scores": mean,
        "images": dict(zip(shares, map(int, count.tolist()), strict=True)),
        "train_gap": gap,
        "test_gap": mean["test"] - mean["generated"],
        "overfitting": (mean["train"] - mean["test"]) / gap if gap > 0 else None,
        "overfitting_error": (error["train"] ** 2 + error["test"] ** 2) ** 0.5 / gap if gap > 0 else None,
    }
