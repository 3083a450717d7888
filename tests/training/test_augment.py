"""DiffAugment against images worked out by hand, and where in a step it happens."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import NetworkConfig, TrainingConfig
from pipeline.distributed.collectives import Ranks
from pipeline.models.networks import Generator, initialise
from pipeline.models.objectives import OBJECTIVES
from pipeline.rng import AUGMENTATION_DRAWS, seeded
from pipeline.training.augment import (
    POLICIES,
    augment,
    change_color,
    cut_out,
    translate,
)
from pipeline.training.image_makers import AccumulatingGenerator
from pipeline.training.inputs import StepInputs
from pipeline.training.step import Step
from tests.training.test_step import Line, step_of

GREY = 0.5


def draws(**given: float) -> Tensor:
    """(1, AUGMENTATION_DRAWS), 0.5 where nothing is given: no change of colour, no translation."""
    names = ("brightness", "saturation", "contrast", "shift_rows", "shift_columns", "cut_rows", "cut_columns")
    assert len(names) == AUGMENTATION_DRAWS
    return torch.tensor([[given.get(name, 0.5) for name in names]], dtype=torch.float64)


def random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed, "values", *shape))


def test_colours_by_hand() -> None:
    """Brighter by 0.2: (0.4 0.8), (0.6 0.8), (0.8 0.2), whose grey is 0.6 in both pixels; saturation 1.5 moves them to
    (0.3 0.9), (0.6 0.9), (0.9 0), whose mean is 0.6; contrast 0.75 draws them towards it."""
    image = torch.tensor([[[[0.2, 0.6]], [[0.4, 0.6]], [[0.6, 0.0]]]], dtype=torch.float64)
    changed = change_color(image, draws(brightness=0.9, saturation=0.75, contrast=0.25))
    assert changed.flatten().tolist() == pytest.approx([0.375, 0.825, 0.6, 0.825, 0.825, 0.15])
    assert change_color(image, draws()).flatten().tolist() == pytest.approx(image.flatten().tolist())
    darkest = change_color(torch.zeros_like(image), draws(brightness=0.0))
    assert darkest.flatten().tolist() == pytest.approx([-0.25] * 6)


def test_translations_by_hand() -> None:
    """A side of 8 moves by at most 1, one of 20 by at most int(2.5 + 0.5) = 3."""
    image = torch.arange(64.0).view(1, 1, 8, 8)
    moved = translate(image, draws(shift_rows=0.9, shift_columns=0.1))
    assert moved[0, 0, 0].tolist() == [GREY] * 8
    assert moved[0, 0, 1].tolist() == [1, 2, 3, 4, 5, 6, 7, GREY]
    assert moved[0, 0, 7].tolist() == [49, 50, 51, 52, 53, 54, 55, GREY]
    assert torch.equal(translate(image, draws()), image)
    wide = torch.arange(20.0).view(1, 1, 1, 20)
    for draw, shift in ((0.0, -3), (0.143, -2), (0.4, -1), (0.5, 0), (0.6, 1), (0.8, 2), (0.999, 3)):
        seen = translate(wide, draws(shift_columns=draw))[0, 0, 0].tolist()
        assert seen == [at - shift if 0 <= at - shift < 20 else GREY for at in range(20)], draw


def test_cutouts_by_hand() -> None:
    """Of 8 pixels 4 are cut out around one of the 9 edges, of 5 int(2.5 + 0.5) = 3 around one of the 5 pixels."""
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    for (rows, expected_rows), (columns, expected_columns) in product(
        ((0.0, {0, 1}), (0.5, {2, 3, 4, 5}), (0.999, {6, 7})),
        ((0.12, {0, 1, 2}), (0.6, {3, 4, 5, 6})),
    ):
        cut = cut_out(image, draws(cut_rows=rows, cut_columns=columns))[0, 0]
        for row, column in product(range(8), range(8)):
            inside = row in expected_rows and column in expected_columns
            assert cut[row, column] == (GREY if inside else image[0, 0, row, column])
    odd = torch.ones(1, 2, 5, 5)
    for draw, expected in ((0.0, {0, 1}), (0.3, {0, 1, 2}), (0.5, {1, 2, 3}), (0.99, {3, 4})):
        cut = cut_out(odd, draws(cut_rows=0.5, cut_columns=draw))
        assert {column for column in range(5) if cut[0, 1, 2, column] == GREY} == expected
        assert (cut[0, :, [0, 4]] == 1).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_place_is_as_likely(seed: int) -> None:
    """Of 3,000 images: shifts of -1, 0 and 1 are a third each (standard deviation 26), and of nine cutouts two show 2
    rows and two show 3 (standard deviation 23)."""
    random_draws = random(seed, 3000, AUGMENTATION_DRAWS)
    position = torch.zeros(3000, 1, 8, 8)
    position[:, :, 3, 4] = 1
    moved = translate(position, random_draws)
    counts = (moved == 1).sum((0, 1))[2:5, 3:6]
    assert counts.sum() == 3000
    for axis in (0, 1):
        assert (counts.sum(axis) - 1000).abs().max() < 5 * 26
    rows = (cut_out(position + 2, random_draws) == GREY).any(3)[:, 0].sum(1)
    for count, ninths in ((2, 2), (3, 2), (4, 5)):
        assert abs((rows == count).sum().item() - 3000 * ninths / 9) < 5 * 28


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_do_not_know_of_each_other_and_gradients_pass(seed: int) -> None:
    images, random_draws = random(seed, 4, 3, 6, 8).requires_grad_(), random(seed, 4, AUGMENTATION_DRAWS)
    policies = list(POLICIES)
    whole = augment(images, random_draws, policies)
    for row in range(4):
        alone = augment(images[row : row + 1], random_draws[row : row + 1], policies)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda values: augment(values, random_draws, policies), (images,))
    assert torch.equal(augment(images, random_draws, []), images)
    cut_last = cut_out(translate(change_color(images, random_draws), random_draws), random_draws)
    assert torch.equal(augment(images, random_draws, policies[::-1]), cut_last)


class Watching(Line):
    """Remembers what it is shown."""

    def __init__(self) -> None:
        super().__init__(0.1, 0.0)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        self.seen.append(images.detach().clone())
        return super().forward(images)


def a_step(training: TrainingConfig, micro_batches: int = 1) -> tuple[Step, Watching]:
    generator = Generator(NetworkConfig(latent_dim=2, width=0.05), (1, 8, 8)).double()
    initialise(generator, seeded(0, "weights"))
    critic = Watching().double()
    plain = step_of(critic, training.objective, generator=generator)
    plain.state.ema = copy.deepcopy(generator)
    images = AccumulatingGenerator(generator, micro_batches, True, Ranks(), nullcontext)
    makes_images = images if micro_batches > 1 else plain.generator
    return Step(training, OBJECTIVES[training.objective], plain.state, critic, makes_images, micro_batches), critic


@pytest.mark.parametrize("seed", [0, 1])
def test_the_critic_sees_augmented_images_alone(seed: int) -> None:
    """Real and fake ones in its own update, fake ones in the generator's, each with draws of its own; whole or in
    micro-batches."""
    policies = ["color", "translation", "cutout"]
    settings: dict[str, Any] = {"objective": "lsgan", "clip_value": None, "n_critic": 2}
    plain, augmented = TrainingConfig(**settings), TrainingConfig(**settings | {"diff_augment": policies})
    real = torch.randint(256, (2, 4, 1, 8, 8), dtype=torch.uint8, generator=seeded(seed, "real"))
    latents, labels = random(seed, 2, 4, 2), torch.zeros(2, 4, dtype=torch.int64)
    for_critic, for_generator = random(seed, 2, 2, 4, AUGMENTATION_DRAWS), random(seed, 4, AUGMENTATION_DRAWS)
    inputs = StepInputs(
        *(real, labels, latents, labels, None, latents[0], labels[0], [0.0, 0.0], [0.0], [0.0]),
        critic_augmentation=for_critic,
        generator_augmentation=for_generator,
    )
    step, watching = a_step(plain)
    step(inputs)
    expected = [
        torch.cat([augment(images, draws, policies) for images, draws in zip(both.chunk(2), sides, strict=True)])
        for both, sides in zip(watching.seen[:2], for_critic, strict=True)
    ]
    expected.append(augment(watching.seen[2], for_generator, policies))
    assert not torch.equal(expected[0], watching.seen[0])
    step, watching = a_step(augmented)
    step(inputs)
    assert len(watching.seen) == 3
    for seen, images in zip(watching.seen, expected, strict=True):
        torch.testing.assert_close(seen, images, rtol=0, atol=1e-12)
    step, watching = a_step(TrainingConfig(**settings | {"objective": "rpgan", "diff_augment": policies}))
    more = torch.cat([real, real[:1].flip(3)]), torch.cat([for_critic, for_critic[:1].flip(2)])
    step(inputs._replace(real=more[0], critic_augmentation=more[1]))
    others = augment(more[0][2] / 255.0, more[1][2, 0], policies)
    assert len(watching.seen) == 4, "the generator's update has real images of its own"
    for seen, images in zip(watching.seen, [*expected, others], strict=True):
        torch.testing.assert_close(seen, images.to(seen.dtype), rtol=0, atol=1e-7)
    step, watching = a_step(augmented, micro_batches=2)
    step(inputs)
    in_order = [torch.cat(watching.seen[at : at + 2]) for at in (0, 2, 4)]
    for seen, images in zip(in_order[:2], expected, strict=False):
        torch.testing.assert_close(seen.view(2, 2, 2, 1, 8, 8).transpose(0, 1).flatten(0, 2), images, rtol=0, atol=1e-9)
    torch.testing.assert_close(in_order[2], expected[2], rtol=0, atol=1e-9)
