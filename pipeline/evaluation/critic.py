"""Whether a critic knows its training images by heart: its scores of them beside those of held-out real images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.data import Dataset
from pipeline.data.resident import load_images
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.features import FORWARD_SIZE
from pipeline.models.networks import Critic
from pipeline.rng import sampling_order

MOST_IMAGES = 2_000
"""Of each kind: 228 GFLOP of the reference's critic for all three."""


def share_of_real_images(dataset: Dataset, split: str, ranks: Ranks) -> Tensor:
    """This rank's share of the first MOST_IMAGES in `rng.sampling_order`: uint8 [n, C, H, W], in shard order, so it
    reads only its share of the shards. Raises DataError as `load_images` does."""
    chosen = sampling_order(torch.arange(dataset.num_images(split))).argsort()[:MOST_IMAGES].sort().values
    share = ranks.share(len(chosen), FORWARD_SIZE)
    return load_images(dataset, split, chosen[share.start : share.stop])


@torch.inference_mode()
def critic_estimates(critic: Critic, shares: Mapping[str, Tensor], ranks: Ranks) -> dict[str, object]:
    """What the critic tells apart, on training images and on held-out ones. Every rank must call it.

    Args:
        shares: "train", "test" and "generated" -> this rank's share of the images, uint8 [n, C, H, W], cut at multiples
            of FORWARD_SIZE; it may be empty.

    Returns on every rank, equal for any number of them but for the rounding of sums:
        "mean_scores" of each kind and how many "images" they are of; "train_gap" and "test_gap", by how much the mean
        of real images is above that of generated ones: for objectives that estimate the Wasserstein distance this is
        the estimate, up to the critic's Lipschitz constant, and its held-out counterpart; "overfitting", (train - test)
        / (train - generated), 0 where the critic scores both alike and 1 where it takes unseen real images for
        generated ones (Karras et al. 2020, arXiv 2006.06676, equation 1, r_v), null where there is no gap, with its
        standard error "overfitting_error", that of the difference of the two means alone.
    """
    sums = torch.zeros(len(shares), 3, dtype=torch.float64)  # a row a kind: number, sum and sum of squares
    weight = next(critic.parameters())
    for row, images in zip(sums, shares.values(), strict=True):
        for part in torch.split(images, FORWARD_SIZE) if len(images) else ():
            # The networks live mirrored.
            scores, _ = critic(part.flip(2, 3).to(weight) / 255)
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
