"""Contracts 1 and 2: draws are functions of their arguments, and slices of a batch that knows no world size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pipeline import rng
from pipeline.distributed.collectives import Ranks
from pipeline.rng import seeded

WHOLE = slice(None)


def test_seed_is_the_hash_of_the_arguments() -> None:
    # Fixed for ever: a change would silently move every saved run to another trajectory.
    # printf "(0, 'critic latents', 7, 3)" | b2sum -l 64, read as a little-endian number.
    assert seeded(0, "critic latents", 7, 3).initial_seed() == 5317288189606675142


@pytest.mark.slow
def test_another_process_draws_the_same_whatever_its_hash_seed() -> None:
    code = "from pipeline.rng import *; print(latents(3, 5, None, 4, 2, slice(None)).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert outputs == {f"{rng.latents(3, 5, None, 4, 2, WHOLE).tolist()}\n"}


def test_purposes_steps_seeds_and_counters_are_separate() -> None:
    seeds = [
        seeded(seed, purpose, *counters).initial_seed()
        for seed in range(4)
        for purpose in ("critic latents", "generator latents", "x")
        for counters in [(), *((i,) for i in range(12)), *((i, j) for i in range(12) for j in range(12))]
    ]
    assert len(set(seeds)) == len(seeds) == 4 * 3 * (1 + 12 + 144)
    assert seeded(0, "x", 12).initial_seed() != seeded(0, "x", 1, 2).initial_seed()


def test_every_draw_of_a_run_is_another() -> None:
    draws = [
        draw
        for seed in range(2)
        for step in range(3)
        for draw in (
            rng.latents(seed, step, None, 4, 4, WHOLE),
            rng.labels(seed, step, None, 16, 10, WHOLE),
            rng.data_indices(seed, step, 16, 10),
            rng.horizontal_flips(seed, step, 64, WHOLE),
            rng.augmentation(seed, step, None, 4, WHOLE),
            *(rng.augmentation(seed, step, index, 4, WHOLE) for index in range(3)),
            *(rng.latents(seed, step, index, 4, 4, WHOLE) for index in range(3)),
            *(rng.labels(seed, step, index, 16, 10, WHOLE) for index in range(3)),
        )
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws) == 2 * 3 * 14


def test_the_global_rng_is_left_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    rng.latents(0, 1, 2, 8, 4, WHOLE)
    rng.labels(0, 1, 2, 8, 10, WHOLE)
    rng.evaluation_latents(0, 0, 600, 4)
    rng.data_indices(0, 1, 8, 100)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_one_global_batch(world_size: int) -> None:
    for seed in range(3):
        parts = [rng.latents(seed, 9, 1, 12, 5, Ranks(rank, world_size).rows(12)) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), rng.latents(seed, 9, 1, 12, 5, WHOLE))
        rows = [Ranks(rank, world_size).rows(12) for rank in range(world_size)]
        draws = [rng.augmentation(seed, 9, 1, 12, row) for row in rows]
        assert torch.equal(torch.cat(draws, dim=1), rng.augmentation(seed, 9, 1, 12, WHOLE))
        draws = [rng.augmentation(seed, 9, None, 12, row) for row in rows]
        assert torch.equal(torch.cat(draws), rng.augmentation(seed, 9, None, 12, WHOLE))
        flips = [rng.horizontal_flips(seed, 9, 12, row) for row in rows]
        assert torch.equal(torch.cat(flips), rng.horizontal_flips(seed, 9, 12, WHOLE))


def test_a_world_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError, match="64 rows among 3 ranks"):  # checks refuse it long before
        Ranks(0, 3).rows(64)


def test_latents_are_uniform_in_minus_one_to_one() -> None:
    for latents in (
        rng.latents(1, 2, 0, 4000, 100, WHOLE),
        rng.latents(1, 2, None, 4000, 100, WHOLE),
        rng.evaluation_latents(1, 0, 4000, 100),
    ):
        assert latents.dtype == torch.float32
        assert latents.shape == (4000, 100)
        assert -1 <= latents.min() < -0.9999
        assert 0.9999 < latents.max() <= 1
        # Uniform on [-1, 1]: mean 0, variance 1/3; the standard errors at 400,000 draws are 0.0009 and 0.0005.
        assert abs(latents.mean().item()) < 0.005
        assert abs(latents.var().item() - 1 / 3) < 0.003


def test_an_evaluation_latent_depends_on_its_number_alone() -> None:
    whole = rng.evaluation_latents(7, 0, 1001, 3)
    assert whole.shape == (1001, 3)
    assert len({tuple(row) for row in whole.tolist()}) == 1001
    for start, stop in [(0, 1), (255, 257), (256, 512), (300, 301), (511, 1001), (1000, 1001), (5, 5), (256, 256)]:
        assert torch.equal(rng.evaluation_latents(7, start, stop, 3), whole[start:stop])
    assert not torch.equal(rng.evaluation_latents(8, 0, 1001, 3), whole)


def test_labels_cover_the_classes() -> None:
    assert rng.evaluation_labels(8, 13, [5] * 10).tolist() == [8, 9, 0, 1, 2]
    sizes = torch.tensor([700, 10, 0, 290])
    whole = rng.evaluation_labels(0, 2500, sizes.tolist())
    assert torch.equal(torch.bincount(whole[:1000], minlength=4), sizes)
    for start, stop in ((0, 100), (0, 733), (990, 1010), (123, 2500)):
        assert torch.equal(rng.evaluation_labels(start, stop, sizes.tolist()), whole[start:stop])
        shown = torch.bincount(whole[start:stop], minlength=4)
        assert ((shown - sizes / 1000 * (stop - start)).abs() <= 1.5).all(), (start, stop)
    # Each of the rare ones alone hardly occurs, but together they have their share everywhere.
    for many, rare in ([900] + [1] * 100, 1), ([1000] * 50 + [1] * 50, 50), ([1000 // n for n in range(1, 501)], 250):
        due = sum(many[rare:]) / sum(many)
        shown = (rng.evaluation_labels(0, sum(many), many) >= rare).double().cumsum(0)
        assert ((shown - due * torch.arange(1, len(shown) + 1)).abs() <= 4).all(), rare
    for labels in (
        rng.labels(0, 3, 1, 10_000, 10, WHOLE),
        rng.labels(0, 3, None, 10_000, 10, WHOLE),
    ):
        counts = torch.bincount(labels, minlength=10)
        assert counts.shape == (10,)
        # Binomial(10,000, 0.1): standard deviation 30.
        assert counts.min() > 850
        assert counts.max() < 1150
    assert not torch.equal(rng.labels(0, 3, 1, 64, 10, WHOLE), rng.labels(0, 3, 2, 64, 10, WHOLE))


def test_data_indices_are_drawn_with_replacement_over_the_whole_split() -> None:
    draws = torch.cat([rng.data_indices(0, number, 64, 50) for number in range(200)])
    assert draws.dtype == torch.int64
    counts = torch.bincount(draws, minlength=50)
    assert counts.shape == (50,)
    # Binomial(12,800, 1/50): mean 256, standard deviation 16.
    assert counts.min() > 176
    assert counts.max() < 336
    assert len(set(rng.data_indices(0, 0, 64, 50).tolist())) < 64
