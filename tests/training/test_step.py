"""Losses and updates against values worked out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import NetworkConfig, OptimizerConfig, TrainingConfig
from pipeline.errors import UserError
from pipeline.models.networks import Critic, Generator, StepGenerator, initialise
from pipeline.models.objectives import OBJECTIVES, Objective, PairedObjective, choose, gradient_penalty, is_conditional
from pipeline.rng import seeded
from pipeline.training.inputs import Images, StepInputs
from pipeline.training.state import TrainingState, build_optimizer
from pipeline.training.step import Step, clip_

REAL, FAKE = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0])


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("name", "real", "fake", "generator"),
    [
        ("wgan", -2.0, 0.5, -0.5),
        ("wgan_gp", -2.0, 0.5, -0.5),
        ("acwgan", -2.0, 0.5, -0.5),
        ("lsgan", (0 + 4) / 2, (1 + 4) / 2, (4 + 1) / 2),
        *[
            (
                name,
                (softplus(-1) + softplus(-3)) / 2,
                (softplus(-1) + softplus(2)) / 2,
                (softplus(1) + softplus(-2)) / 2,
            )
            for name in ("gan", "acgan")
        ],
    ],
)
def test_losses_by_hand(name: str, real: float, fake: float, generator: float) -> None:
    objective = OBJECTIVES[name]
    assert isinstance(objective, Objective)
    assert objective.real_loss(REAL).item() == pytest.approx(real)
    assert objective.fake_loss(FAKE).item() == pytest.approx(fake)
    assert objective.generator_loss(FAKE).item() == pytest.approx(generator)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_critic_pushes_scores_apart_and_the_generator_pulls_them_up(name: str) -> None:
    """At a score of 0.5 every objective wants real scores higher, fake ones lower, the generator's higher."""
    objective = OBJECTIVES[name]
    real, fake, own = (torch.full((4,), 0.5, requires_grad=True) for _ in range(3))
    losses = [*objective.critic_losses(real, fake)]
    losses.append(objective.generator_loss(*(own, torch.zeros(4))[: 1 + objective.paired]))
    torch.autograd.backward(losses)
    for scores, sign in ((real, -1), (fake, 1), (own, -1)):
        assert scores.grad is not None
        assert (scores.grad.sign() == sign).all()


def less(left: Tensor, right: Tensor) -> Tensor:
    return F.softplus(left - right).mean()


RAGAN = PairedObjective(
    lambda real, fake: (less(fake.mean(), real) + less(fake, real.mean())) / 2,
    lambda fake, real: (less(real.mean(), fake) + less(real, fake.mean())) / 2,
)
RALSGAN = PairedObjective(
    lambda real, fake: (real - fake.mean() - 1).square().mean() + (fake - real.mean() + 1).square().mean(),
    lambda fake, real: (fake - real.mean() - 1).square().mean() + (real - fake.mean() + 1).square().mean(),
)
PROJECTED = Objective(lambda scores: -scores.mean(), torch.mean, lambda scores: -scores.mean(), projects=True)
RPHINGE = PairedObjective(
    lambda real, fake: F.relu(1 - (real - fake)).mean(), lambda fake, real: F.relu(1 - (fake - real)).mean()
)


@pytest.mark.parametrize(
    ("name", "critic", "generator"),
    [
        ("rpgan", (softplus(-2) + softplus(-1)) / 2, (softplus(2) + softplus(1)) / 2),
        # Of users: the relativistic average ones of Jolicoeur-Martineau 2018, and a hinge of pairs.
        (
            "tests.training.test_step:RAGAN",
            (softplus(-0.5) + softplus(-2.5) + softplus(-3) + softplus(0)) / 4,
            (softplus(0.5) + softplus(2.5) + softplus(3) + softplus(0)) / 4,
        ),
        ("tests.training.test_step:RALSGAN", (0.25 + 2.25 + 4 + 1) / 2, (16 + 1 + 2.25 + 12.25) / 2),
        ("tests.training.test_step:RPHINGE", 0.0, (3 + 2) / 2),
    ],
)
def test_paired_losses_by_hand(name: str, critic: float, generator: float) -> None:
    """Of the pairs (1, -1) and (3, 2). Either side of the critic's loss is the loss, whose half either one adds."""
    objective = choose(TrainingConfig(objective=name, clip_value=None))
    sides = objective.critic_losses(REAL, FAKE)
    assert [side.item() for side in sides] == pytest.approx([critic] * 2)
    assert objective.joint_weight * (sides[0] + sides[1]).item() == pytest.approx(critic)
    assert isinstance(objective, PairedObjective)
    assert objective.generator_loss(FAKE, REAL).item() == pytest.approx(generator)


def test_the_generator_of_pairs_has_no_gradient_through_real_images() -> None:
    """L = softplus(f(x) - f(G)): f(G) has the slope -sigmoid(f(x) - f(G)), the critic and x have none."""
    made, real = (torch.tensor(value).view(1, 1, 1, 1).requires_grad_() for value in (0.5, 2.0))
    critic = Line(3.0, 7.0)
    labels = torch.zeros(1, dtype=torch.int64)
    loss = step_of(critic, "rpgan").update_generator([made], labels, None, Images(real, labels))
    assert loss.item() == pytest.approx(softplus(3 * 1.5))
    assert made.grad is not None
    assert made.grad.item() == pytest.approx(-3 / (1 + math.exp(-4.5)))
    assert real.grad is None
    assert critic.b.item() == 7.0


def test_gradient_penalty_by_hand() -> None:
    """f(x) = w . x has the gradient w everywhere; its derivative by w is 2 (|w| - 1) w / |w|."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    images = torch.rand(5, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(images.flatten(1) @ weight, images)
    assert penalty.item() == pytest.approx(16.0)
    (slope,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(slope, 8 * torch.tensor([0.6, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_penalty_passes_gradcheck_through_the_critic(seed: int) -> None:
    critic = Critic(NetworkConfig(width=0.03), (1, 8, 8)).double()
    initialise(critic, seeded(seed, "weights"))
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=seeded(seed, "images"), requires_grad=True)
    weight = critic.get_parameter("convolutions.0.weight")

    def penalty(value: Tensor) -> Tensor:
        scores = torch.func.functional_call(critic, {"convolutions.0.weight": value}, (images,))[0]
        return gradient_penalty(scores, images)

    assert torch.autograd.gradcheck(penalty, (weight.detach().clone().requires_grad_(),))


class Line(nn.Module):
    """score = w * pixel + b."""

    def __init__(self, w: float, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.w * images.flatten(1).sum(1) + self.b, None


class Square(Line):
    """score = w x^2 / 2 + b, which has the slope w x."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.w * images.flatten(1).square().sum(1) / 2 + self.b, None


def batch(*pixels: float) -> Images:
    return Images(torch.tensor(pixels).view(-1, 1, 1, 1), torch.zeros(len(pixels), dtype=torch.int64))


def step_of(
    critic: nn.Module,
    objective: str = "wgan",
    *,
    generator: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **training: Any,
) -> Step:
    """A step on these networks with RMSprop; `training`: settings beside the objective."""
    generator = critic if generator is None else generator
    state = TrainingState(
        cast(Generator, generator),
        cast(Critic, critic),
        cast(Generator, generator),
        rmsprop(generator),
        optimizer or rmsprop(critic),
        scaler or torch.amp.GradScaler(enabled=False),
        new_generator=lambda: cast(Generator, generator),
        new_critic=lambda: critic,
    )
    settings = TrainingConfig(**({"objective": objective, "clip_value": None} | training))
    images = StepGenerator(cast(Generator, generator), settings.critic_fakes == "batch")
    return Step(settings, OBJECTIVES.get(objective) or choose(settings), state, critic, images)


def rmsprop(network: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(learning_rate=0.01), network)


def test_a_joint_wgan_step_by_hand() -> None:
    """RMSprop's first step is lr * g / sqrt(0.1 g^2) = lr * sqrt(10) * sign(g), here for g = -0.6 + 0.2 (b: 0)."""
    critic = Line(0.5, 0.1)
    losses = step_of(critic).update_critic(batch(0.4, 0.8), batch(0.1, 0.3), None)
    assert losses.tolist() == pytest.approx([-(0.5 * 0.6 + 0.1), 0.5 * 0.2 + 0.1])
    assert critic.w.item() == pytest.approx(0.5 + 0.01 * math.sqrt(10), rel=1e-5)
    assert critic.b.item() == pytest.approx(0.1)


def test_separate_steps_are_two_updates() -> None:
    """First g = -0.6, v = 0.1 * 0.36; then g = 0.2, v = 0.9 * 0.036 + 0.1 * 0.04. The fake loss sees the first."""
    critic = Line(0.5, 0.0)
    losses = step_of(critic, critic_updates="separate").update_critic(batch(0.4, 0.8), batch(0.1, 0.3), None)
    after_real = 0.5 + 0.01 * 0.6 / math.sqrt(0.036)
    assert losses[1].item() == pytest.approx(0.2 * after_real + 0.01 * math.sqrt(10), rel=1e-5)
    assert critic.w.item() == pytest.approx(after_real - 0.01 * 0.2 / math.sqrt(0.9 * 0.036 + 0.004), rel=1e-5)


@pytest.mark.parametrize("order", ["joint", "separate"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_parameter_is_clipped_after_the_update(order: str, seed: int) -> None:
    critic = Critic(NetworkConfig(width=0.1), (1, 28, 28))
    initialise(critic, seeded(seed, "weights"))
    real, fake = (Images(torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)) for _ in range(2))
    step_of(critic, critic_updates=order, clip_value=0.01).update_critic(real, fake, None)
    largest = max(parameter.abs().max().item() for parameter in critic.parameters())
    assert largest == torch.tensor(0.01).item()


@pytest.mark.parametrize("weight", [0.25, 0.9, torch.tensor(0.25), torch.tensor(0.9)])
def test_the_average_moves_towards_the_generator(weight: float | Tensor) -> None:
    """mean + weight (value - mean), moving statistics included and the counter of batches not."""
    config = NetworkConfig(latent_dim=2, width=0.05)
    generator, average = Generator(config, (1, 4, 4)).double(), Generator(config, (1, 4, 4)).double()
    for number, network in enumerate((generator, average)):
        for norm in network.norms:
            norm.get_buffer("running_mean").fill_(3.0 + number)
            norm.get_buffer("num_batches_tracked").fill_(7 + number)
    before = copy.deepcopy(average.state_dict())
    step = step_of(Line(0.1, 0.0), generator=generator)
    step.state.ema = average
    step.state.update_ema(weight)
    for name, value in generator.state_dict().items():
        expected = before[name] + float(weight) * (value - before[name]) if value.is_floating_point() else before[name]
        torch.testing.assert_close(average.state_dict()[name], expected, rtol=1e-7, atol=1e-9)


def test_clipping_leaves_what_is_inside_alone() -> None:
    line = Line(0.004, -0.7)
    clip_(line, 0.01)
    assert line.w.item() == pytest.approx(0.004)
    assert line.b.item() == pytest.approx(-0.01)


def test_the_gradient_penalty_is_taken_between_real_and_fake() -> None:
    """At x = mix real + (1 - mix) fake the penalty is (|w x| - 1)^2, w x being the slope."""
    critic = Square(2.0, 0.0)
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    step = step_of(critic, "wgan_gp", optimizer=optimizer, gradient_penalty=10.0)
    step.update_critic(batch(0.8), batch(0.4), torch.tensor([0.25]))
    x = 0.25 * 0.8 + 0.75 * 0.4
    slope = -(0.8**2) / 2 + 0.4**2 / 2 + 10 * 2 * (2 * x - 1) * x
    assert critic.w.item() == pytest.approx(2.0 - slope, rel=1e-5)


def test_the_r1_penalty_is_taken_at_the_real_images() -> None:
    """It is gamma / 2 times the mean of (w x)^2, whose derivative by w is gamma w x^2; lsgan's losses have the others:
    (s - 1) x^2 / 2 at real scores s, s x^2 / 2 at fake ones, averaged over both."""
    critic = Square(2.0, 0.5)
    step = step_of(critic, "lsgan", optimizer=torch.optim.SGD(critic.parameters(), lr=1.0), r1_penalty=3.0)
    step.update_critic(batch(0.8, 0.2), batch(0.4, 0.4), None)
    real, fake = (0.64, 0.04), 0.16
    slope = sum((x + 0.5 - 1) * x / 2 for x in real) / 2 + (fake + 0.5) * fake / 2
    slope += 3.0 * 2.0 * sum(real) / 2
    assert critic.w.item() == pytest.approx(2.0 - slope, rel=1e-5)


def test_both_penalties_of_pairs_by_hand() -> None:
    """A pair (x, y) has the loss softplus(-w (x^2 - y^2) / 2); gamma / 2 times (w x)^2 and (w y)^2 are added, times the
    factor of the step."""
    critic = Square(2.0, 0.5)
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    step = step_of(critic, "rpgan", optimizer=optimizer, r1_penalty=3.0, r2_penalty=5.0)
    losses = step.update_critic(batch(0.8, 0.2), batch(0.4, 0.6), None, 0.25)
    pairs = [(0.64, 0.16), (0.04, 0.36)]
    assert losses.tolist() == pytest.approx([sum(softplus(y - x) for x, y in pairs) / 2] * 2)
    slope = sum(-(x - y) / 2 / (1 + math.exp(x - y)) for x, y in pairs) / 2
    slope += 0.25 * 2.0 * sum(3.0 * x + 5.0 * y for x, y in pairs) / 2
    assert critic.w.item() == pytest.approx(2.0 - slope, rel=1e-5)
    assert critic.b.item() == 0.5


class Classed(Line):
    """score = w * pixel + b as any image, and c_y * pixel more as one of class y."""

    def __init__(self, w: float, b: float, *c: float) -> None:
        super().__init__(w, b)
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(images)[0], images.flatten(1).sum(1, keepdim=True) * self.c


def test_pairs_of_a_class_by_hand() -> None:
    """An image x of class y has the score (w + c_y) x + b, and the slope w + c_y: of two pairs, one of each class."""
    critic = Classed(0.5, 7.0, 1.0, -2.0)
    labels = torch.tensor([1, 0])
    real, fake = (Images(batch(*pixels).pixels, labels) for pixels in ((0.8, 0.2), (0.4, 0.6)))
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    step = step_of(critic, "crpgan", optimizer=optimizer, r1_penalty=3.0)
    # Before the critic's update. The generator's images are paired with real ones, here the same.
    generator_loss = step.update_generator([fake.pixels.clone().requires_grad_()], labels, None, real)
    assert generator_loss.item() == pytest.approx((softplus(-1.5 * 0.4) + softplus(1.5 * -0.4)) / 2)
    losses = step.update_critic(real, fake, None)
    assert losses.tolist() == pytest.approx([(softplus(1.5 * 0.4) + softplus(-1.5 * -0.4)) / 2] * 2)
    # d/dc_y of softplus(-(w + c_y)(x - x')) is -(x - x') / (1 + e^((w + c_y)(x - x'))); gamma / 2 of R1 is taken of the
    # mean over both images, so (w + c_y) gamma / 2.
    slopes = [-(0.2 - 0.6) / (1 + math.exp(1.5 * -0.4)) / 2, -(0.8 - 0.4) / (1 + math.exp(-1.5 * 0.4)) / 2]
    expected = [c - slope - 3.0 / 2 * (0.5 + c) for c, slope in zip((1.0, -2.0), slopes, strict=True)]
    assert critic.c.tolist() == pytest.approx(expected)
    assert critic.b.item() == 7.0


def test_a_separate_update_scores_images_of_their_class() -> None:
    critic = Classed(0.5, 7.0, 1.0, -2.0)
    step = step_of(
        critic,
        "tests.training.test_step:PROJECTED",
        optimizer=torch.optim.SGD(critic.parameters(), lr=0.0),
        critic_updates="separate",
    )
    real, fake = (Images(batch(pixel).pixels, torch.tensor([y])) for pixel, y in ((0.8, 0), (0.4, 1)))
    assert step.update_critic(real, fake, None).tolist() == pytest.approx([-(1.5 * 0.8 + 7), -1.5 * 0.4 + 7])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_generator_step_moves_the_generator_alone(name: str) -> None:
    num_classes = 3 if is_conditional(OBJECTIVES[name]) else 0
    config = NetworkConfig(latent_dim=4, width=0.1)
    generator, critic = Generator(config, (1, 8, 8), num_classes), Critic(config, (1, 8, 8), num_classes)
    before = [[value.clone() for value in network.parameters()] for network in (generator, critic)]
    labels = torch.tensor([0, 1, 2, 0])
    step = step_of(critic, name, generator=generator)
    _, images = step.generator(torch.rand(1, 4, 4), labels[None], torch.rand(4, 4), labels)
    step.update_generator(
        images, labels, None, Images(torch.rand(4, 1, 8, 8), labels) if OBJECTIVES[name].paired else None
    )
    changed = [
        any(not torch.equal(old, new) for old, new in zip(old_values, network.parameters(), strict=True))
        for old_values, network in zip(before, (generator, critic), strict=True)
    ]
    assert changed == [True, False]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in critic.parameters())


@pytest.mark.parametrize(("name", "of_scores"), [("acgan", math.log(2)), ("acwgan", 0.0)])
def test_the_class_head_adds_the_cross_entropy_of_both_batches(name: str, of_scores: float) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([2.0, 0.0]))

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return self.logits.sum() * torch.zeros(len(images)), self.logits.expand(len(images), 2)

    critic = Fixed()
    real = Images(torch.zeros(1, 1, 1, 1), torch.tensor([0]))
    fake = Images(torch.zeros(1, 1, 1, 1), torch.tensor([1]))
    still = torch.optim.SGD(critic.parameters(), lr=0.0)
    losses = step_of(critic, name, optimizer=still).update_critic(real, fake, None)
    assert losses.tolist() == pytest.approx([of_scores + softplus(-2), of_scores + softplus(2)])


def test_real_pixels_are_scaled_from_a_fixed_range() -> None:
    """Whatever the batch holds: 51 of 255 is 0.2."""
    seen: list[Tensor] = []

    class Recording(Line):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            seen.append(images)
            return super().forward(images)

    config = NetworkConfig(latent_dim=2, width=0.05)
    generator = Generator(config, (1, 4, 4)).double()
    step = step_of(Recording(0.1, 0.0).double(), generator=generator, n_critic=1)
    step.state.ema = copy.deepcopy(generator)
    real = torch.tensor([0, 51, 255, 51] * 8, dtype=torch.uint8).view(1, 2, 1, 4, 4)
    latents, labels = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)
    step(StepInputs(real, labels, latents, labels, None, latents[0], labels[0], [0.0], [0.0], [0.0]))
    assert seen[0][:2].flatten().tolist() == [0.0, 0.2, 1.0, 0.2] * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "wgann"}, "training.objective is 'wgann': choose one of wgan"),
        ({"clip_value": None}, "training.clip_value is null"),
        ({"objective": "wgan_gp", "clip_value": None, "spectral_norm": True}, "training.gradient_penalty is null"),
        ({"objective": "lsgan"}, "training.clip_value is 0.01: the objective lsgan does not use it"),
        ({"objective": "wgan_gp", "clip_value": None}, "training.gradient_penalty is null"),
        (
            {"objective": "wgan_gp", "clip_value": None, "gradient_penalty": 10.0, "critic_updates": "separate"},
            "needs joint updates",
        ),
        (
            {"objective": "rpgan", "clip_value": None, "critic_updates": "separate"},
            "training.critic_updates is separate: the objective rpgan compares real with fake scores, which needs",
        ),
        ({"clip_value": 0.1, "penalty_annealing": 9}, "training.penalty_annealing is 9: there is no penalty"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(TrainingConfig(**changes))  # type: ignore[arg-type]


def test_spectral_norm_may_take_the_place_of_the_clip() -> None:
    assert choose(TrainingConfig(clip_value=None, spectral_norm=True)) is OBJECTIVES["wgan"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonsense", "choose one of wgan, .*, or give module:NAME of your own"),
        ("math:nothing", "no attribute 'nothing'"),
        ("nothing_at_all:x", "No module named 'nothing_at_all'; it was looked for in /"),
        ("tests.guide.py:x", "; leave out .py$"),
        ("math:pi", "that is a float, not an Objective or PairedObjective"),
    ],
)
def test_an_objective_that_is_none_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"training.objective is '{name}': .*{reason}"):
        choose(TrainingConfig(objective=name))


def test_fp16_losses_are_scaled_and_gradients_are_not() -> None:
    """A loss scale of 2^16 leaves the step as it is; one whose gradients overflow is left out and the scale halved."""
    scaled, plain = Line(0.5, 0.1), Line(0.5, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    steps = [step_of(line, "lsgan", scaler=chosen) for line, chosen in ((scaled, scaler), (plain, None))]
    for step in steps:
        step.update_critic(batch(0.4, 0.8), batch(0.1, 0.3), None)
    assert scaled.w.item() == pytest.approx(plain.w.item(), rel=1e-6)
    before = scaled.w.item()
    steps[0].update_critic(batch(1e30, 1e30), batch(0.1, 0.3), None)
    assert scaled.w.item() == before
    assert scaler.get_scale() == 2.0**15


def test_fp16_goes_on_from_before_the_first_update_that_did_not_overflow() -> None:
    states = [step_of(Line(0.5, 0.1), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**n)).state for n in (15, 16)]
    states[1].load(states[0].tensors(), step=1)
    assert states[1].scaler.get_scale() == 2.0**15
    assert not states[1].critic_optimizer.state
