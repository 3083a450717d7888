"""Every random number of a run, as a function of (seed, purpose, counters), so that no generator's state is ever saved.

Batches are drawn whole and then sliced, so they do not depend on the number of ranks. Drawing all of a batch on every
rank costs 25 microseconds at 64 x 100 latents.

`rows` are a rank's rows of the global batch of `batch_size`, b of them. `step` and `critic_index` (the iteration in it)
count from 0; without a `critic_index` a draw is of the generator's update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch

EVALUATION_BLOCK = 256
"""Number of evaluation latents that are drawn at once. Changing it changes every evaluation image."""
AUGMENTATION_DRAWS = 7
"""Number of draws for each image, whichever changes are made: brightness, saturation, contrast, and rows and columns of
a translation and of a cutout."""


def seeded(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Returns a CPU generator that depends on its arguments alone: the same in every process and Python version.

    `purpose` separates independent uses of the same counters. The hash gives 64 bits, of which torch's CPU generator
    keeps the lower 32. So among the 240,000 generators of a long run a few pairs coincide, which does no harm.
    """
    digest = blake2b(repr((int(seed), purpose, *map(int, counters))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def fresh_seed(seed: int) -> int:
    """Returns the seed of evaluation images that a run of `seed` does not use. A checkpoint that is chosen by its
    scores on the run's images is reported with scores on these, which are not biased by the choice."""
    return seeded(seed, "fresh evaluation images").initial_seed() % 2**31


def latents(
    seed: int, step: int, critic_index: int | None, batch_size: int, latent_dim: int, rows: slice
) -> torch.Tensor:
    """Draws latents of an update: float32 (b, latent_dim) uniform in [-1, 1]."""
    return _uniform(_of_update(seed, "latents", step, critic_index), batch_size, latent_dim)[rows]


def evaluation_latents(seed: int, start: int, stop: int, latent_dim: int) -> torch.Tensor:
    """Draws latents of evaluation images start, ..., stop - 1: float32 (stop - start, latent_dim) uniform in [-1, 1].

    The latent of image i depends on (seed, i) alone, whatever the range.
    """
    first_block = start // EVALUATION_BLOCK
    blocks = [
        _uniform(seeded(seed, "evaluation latents", block), EVALUATION_BLOCK, latent_dim)
        for block in range(first_block, max(start, stop - 1) // EVALUATION_BLOCK + 1)
    ]
    return torch.cat(blocks)[start - first_block * EVALUATION_BLOCK :][: stop - start]


def labels(
    seed: int, step: int, critic_index: int | None, batch_size: int, num_classes: int, rows: slice
) -> torch.Tensor:
    """Draws the labels of the generator's images in an update: int64 (b,), uniform over the classes."""
    return torch.randint(num_classes, (batch_size,), generator=_of_update(seed, "labels", step, critic_index))[rows]


def evaluation_labels(start: int, stop: int, sizes: Sequence[int]) -> torch.Tensor:
    """Returns the labels of evaluation images start, ..., stop - 1: int64. Each class has the share of its size among
    all, in the first images as in many: of equal sizes the classes take turns."""
    order = _spread(tuple(sizes))
    return order[torch.arange(start, stop) % len(order)]


@lru_cache(maxsize=4)
def _spread(sizes: tuple[int, ...]) -> torch.Tensor:
    """Returns as many labels of each class as its size is, spread evenly; classes of one size take turns."""
    groups: dict[int, list[int]] = {}
    for label, size in enumerate(sizes):
        groups.setdefault(size, []).append(label)
    places, labels = [], []
    for number, (size, members) in enumerate(groups.items()):
        for turn, label in enumerate(members):
            # Multiples of the golden ratio spread the groups, or all classes that are rare would come together.
            offset = ((turn + 0.5) / len(members) + 0.618034 * number) % 1
            places.append((torch.arange(size).double() + offset) / size)
            labels.append(torch.full((size,), label))
    return torch.cat(labels)[torch.cat(places).argsort(stable=True)]


def penalty_mix(seed: int, step: int, critic_index: int, batch_size: int, rows: slice) -> torch.Tensor:
    """Draws where between fake and real images the gradient penalty is taken: float32 (b,) uniform in [0, 1]."""
    return torch.rand(batch_size, generator=seeded(seed, "penalty mix", step, critic_index))[rows]


def data_indices(seed: int, batch_number: int, batch_size: int, num_images: int) -> torch.Tensor:
    """Draws the real images of a global critic batch: int64 (batch_size,), uniform with replacement as in the
    reference."""
    return torch.randint(num_images, (batch_size,), generator=seeded(seed, "data indices", batch_number))


def horizontal_flips(seed: int, batch_number: int, batch_size: int, rows: slice) -> torch.Tensor:
    """Draws which real images of a critic batch are flipped left to right: bool (b,), at even odds."""
    return torch.rand(batch_size, generator=seeded(seed, "horizontal flips", batch_number))[rows] < 0.5


def augmentation(seed: int, step: int, critic_index: int | None, batch_size: int, rows: slice) -> torch.Tensor:
    """Draws DiffAugment's changes, uniform in [0, 1): of the real and the fake images of a critic iteration, float32
    (2, b, AUGMENTATION_DRAWS), or of the images of the generator's update, (b, AUGMENTATION_DRAWS)."""
    sides = () if critic_index is None else (2,)
    generator = _of_update(seed, "augmentation", step, critic_index)
    return torch.rand(*sides, batch_size, AUGMENTATION_DRAWS, generator=generator)[..., rows, :]


def sampling_order(indices: torch.Tensor) -> torch.Tensor:
    """Returns the places of images in a fixed random order: int64 (n,) -> int64 (n,). The images with the lowest places
    are a random sample of any set.

    It is a bijection (the finaliser of splitmix64, Steele et al. 2014), so no two indices share a place. It takes no
    seed, so the sample that stands for a real split is the same in every evaluation.
    """
    mixed = indices.cpu().numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((mixed ^ (mixed >> np.uint64(31))).view(np.int64)).to(indices.device)


def _of_update(seed: int, what: str, step: int, critic_index: int | None) -> torch.Generator:
    if critic_index is None:
        return seeded(seed, f"generator {what}", step)
    return seeded(seed, f"critic {what}", step, critic_index)


def _uniform(generator: torch.Generator, num_rows: int, num_columns: int) -> torch.Tensor:
    return torch.empty(num_rows, num_columns, dtype=torch.float32).uniform_(-1, 1, generator=generator)
