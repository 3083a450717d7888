"""Spectral normalisation against values worked out by hand, torch's own, and exact singular values."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pipeline.config import NetworkConfig
from pipeline.distributed.process import Runtime
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.networks import Critic, initialise
from pipeline.models.spectral_norm import SpectralNorm, follow_update, norms, raw_weights, use_spectral_norm
from pipeline.rng import seeded
from pipeline.training.trainer import Trainer
from tests.jobs import restoring_process, tiny_config


def weight_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def norm_with(weight: Tensor, u: list[float], v: list[float]) -> SpectralNorm:
    norm = SpectralNorm(weight, seeded(0, "singular vectors"))
    norm.u.copy_(torch.tensor(u))
    norm.v.copy_(torch.tensor(v))
    return norm


def a_critic(seed: int, num_classes: int = 0) -> Critic:
    critic = Critic(NetworkConfig(width=0.1), (1, 8, 8), num_classes).double().to(memory_format=torch.channels_last)
    initialise(critic, seeded(seed, "weights"))
    return critic


def test_a_power_iteration_by_hand() -> None:
    """W = diag(4, 3) and u = (0.6, 0.8): W^T u = (2.4, 2.4), so v = (1, 1) / sqrt 2, and W v = (4, 3) / sqrt 2, so
    u = (0.8, 0.6)."""
    weight = weight_of([4, 0], [0, 3])
    norm = norm_with(weight, [0.6, 0.8], [1.0, 0.0])
    norm.iterate(weight)
    assert norm.v.tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert norm.u.tolist() == pytest.approx([0.8, 0.6])


def test_the_division_and_its_gradient_by_hand() -> None:
    """With u = (0.6, 0.8) and v = (0.8, 0.6), sigma of diag(4, 3) is 4 * 0.48 + 3 * 0.48 = 3.36. The slope of
    W_11 / sigma by W_ij is [ij = 11] / sigma - W_11 u_i v_j / sigma^2."""
    weight = weight_of([4, 0], [0, 3]).requires_grad_()
    divided = norm_with(weight.detach(), [0.6, 0.8], [0.8, 0.6])(weight)
    assert divided.flatten().tolist() == pytest.approx([4 / 3.36, 0, 0, 3 / 3.36])
    (slope,) = torch.autograd.grad(divided[0, 0], weight)
    expected = [1 / 3.36 - 4 * 0.48 / 3.36**2, *(-4 * uv / 3.36**2 for uv in (0.36, 0.64, 0.48))]
    assert slope.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_torchs_own_at_the_same_vectors(seed: int) -> None:
    """Whose columns are in another order; its gradients too."""
    layer = nn.Conv2d(3, 4, 5).double()
    ours, theirs = nn.Conv2d(3, 4, 5).double(), parametrizations.spectral_norm(nn.Conv2d(3, 4, 5).double()).eval()
    nn.init.normal_(layer.weight, generator=seeded(seed, "weight"))
    norm = SpectralNorm(layer.weight.detach(), seeded(seed, "singular vectors"))
    stock = cast(nn.ModuleDict, theirs.parametrizations)["weight"]
    stock.get_parameter("original").data.copy_(layer.weight.data)
    stock.get_buffer("0._u").copy_(norm.u)
    stock.get_buffer("0._v").copy_(norm.v.view(5, 5, 3).permute(2, 0, 1).flatten())
    parametrize.register_parametrization(ours, "weight", norm)
    [(_, original)] = norms(ours)
    original.data.copy_(layer.weight.data)
    images = torch.rand(2, 3, 7, 7, dtype=torch.float64, generator=seeded(seed, "images"))
    theirs.get_parameter("bias").data.copy_(ours.get_parameter("bias").data)
    outputs_of_ours, expected = ours(images), theirs(images)
    torch.testing.assert_close(outputs_of_ours, expected, rtol=1e-12, atol=1e-12)
    for outputs, weight in ((outputs_of_ours, original), (expected, stock.get_parameter("original"))):
        outputs.square().sum().backward()
        assert weight.grad is not None
    torch.testing.assert_close(original.grad, stock.get_parameter("original").grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("seed", "num_classes"), [(0, 0), (1, 3)])
def test_every_weight_of_the_critic_comes_to_have_norm_one(seed: int, num_classes: int) -> None:
    """And the critic computes what one with the divided weights computes, by a CPU's kernels too."""
    critic, plain = a_critic(seed, num_classes), a_critic(seed, num_classes)
    use_spectral_norm(critic, seeded(seed, "singular vectors"))
    pairs = norms(critic)
    assert len(pairs) == sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in plain.modules())
    for norm, weight in pairs:
        for _ in range(1000):
            norm.iterate(weight)
        assert torch.linalg.matrix_norm(norm(weight).flatten(1), 2).item() == pytest.approx(1, abs=1e-6)
    weights = raw_weights(critic.state_dict())
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(
        {name: value / torch.linalg.matrix_norm(value.flatten(1), 2) if value.ndim > 1 else value
         for name, value in weights.items()}
    )  # fmt: skip
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=seeded(seed, "images"))
    use_cpu_kernels(critic)
    torch.testing.assert_close(critic(images), plain(images), rtol=1e-6, atol=1e-6)


def test_the_vectors_are_a_function_of_the_seed_and_follow_updates_alone() -> None:
    """A forward pass leaves them as they are, whoever takes it; an update moves them once."""

    def vectors(seed: int) -> tuple[Critic, list[Tensor]]:
        critic = a_critic(0)
        torch.rand(1)  # of the global generator, on which nothing depends
        use_spectral_norm(critic, seeded(seed, "singular vectors"))
        return critic, [norm.u for norm, _ in norms(critic)]

    (critic, ours), (_, same), (_, others) = (vectors(seed) for seed in (0, 0, 1))
    assert all(torch.equal(one, other) for one, other in zip(ours, same, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(ours[:-1], others[:-1], strict=True))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    for _ in range(3):
        before = [norm.u.clone() for norm, _ in norms(critic)]
        critic(torch.rand(2, 1, 8, 8, dtype=torch.float64))[0].sum().backward()
        assert all(torch.equal(one, norm.u) for one, (norm, _) in zip(before, norms(critic), strict=True))
        optimizer.step()
        follow_update(critic)
        for u, (norm, weight) in zip(before, norms(critic), strict=True):
            matrix = weight.detach().movedim(1, -1).flatten(1)
            product = matrix @ (matrix.T @ u)
            torch.testing.assert_close(norm.u, product / product.norm(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("critic_updates", "updates"), [("joint", 2), ("separate", 4)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_takes_one_power_iteration_an_update_of_the_critic(
    critic_updates: str,
    updates: int,
    accumulation: int,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many forward passes that takes, and none in the generator's."""
    training = {"spectral_norm": True, "n_critic": 2, "critic_updates": critic_updates}
    config = tiny_config(
        run={"root": str(tmp_path)},
        data={"dataset": str(tiny_dataset)},
        training=training,
        runtime={"accumulation": accumulation},
    )
    iterated: list[int] = []
    with restoring_process():
        runtime = Runtime(config.runtime)
        trainer = Trainer(config, runtime)
        monkeypatch.setattr(SpectralNorm, "iterate", lambda norm, weight: iterated.append(len(norm.u)))
        trainer.take_step()
        runtime.close()
    assert len(iterated) == updates * len(norms(trainer.state.critic))


@pytest.mark.parametrize("critic_updates", ["joint", "separate"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_forward_pass_divides_by_the_norm_of_the_weights_that_it_uses(
    critic_updates: str, accumulation: int, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The last power iteration was on these, whether or not an update, or a clip after it, changed them."""
    training = {"spectral_norm": True, "n_critic": 2, "critic_updates": critic_updates, "clip_value": 0.01}
    config = tiny_config(
        run={"root": str(tmp_path)},
        data={"dataset": str(tiny_dataset)},
        training=training,
        runtime={"accumulation": accumulation, "precision": "float64"},
    )
    agree: list[bool] = []

    def compare(norm: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        product = inputs[0].detach().movedim(1, -1).flatten(1) @ norm.get_buffer("v")
        agree.append(torch.allclose(product / product.norm(), norm.get_buffer("u"), rtol=0, atol=1e-12))

    with restoring_process():
        runtime = Runtime(config.runtime)
        trainer = Trainer(config, runtime)
        for norm, _ in norms(trainer.state.critic):
            norm.register_forward_hook(compare)
        trainer.take_step()
        runtime.close()
    passes = accumulation * (2 * (1 if critic_updates == "joint" else 2) + 1)
    assert agree == [True] * passes * len(norms(trainer.state.critic))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_norm_keeps_its_digits(dtype: torch.dtype) -> None:
    critic = a_critic(0).float()
    use_spectral_norm(critic, seeded(0, "singular vectors"))
    layer = critic.convolutions[1]
    expected = layer.weight
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(cast(Tensor, layer.weight), cast(Tensor, expected))
