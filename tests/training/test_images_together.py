"""All images of a step made layer by layer are those made batch by batch, over one process; statistics, gradients and
what batch norm remembers included. (Several processes: tests/distributed/test_trajectory.py.)"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import NetworkConfig
from pipeline.distributed.batch_norm import SyncBatchNorm, convert_batch_norm
from pipeline.models.networks import Generator, StepGenerator, initialise
from pipeline.rng import seeded
from pipeline.training import image_makers
from pipeline.training.image_makers import LayerwiseStepGenerator, normalise

SIZE, BATCHES = 6, 3
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed, "values", *shape))


def a_generator(seed: int, num_classes: int) -> Generator:
    generator = Generator(NetworkConfig(latent_dim=5, width=0.1), (1, 8, 8), num_classes).double()
    initialise(generator, seeded(seed, "weights"))
    return generator


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize(("seed", "num_classes"), [(0, 0), (1, 10), (2, 0)])
def test_images_and_gradients_are_those_of_one_batch_after_the_other(
    seed: int, num_classes: int, synchronised: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one portion, or in several."""
    monkeypatch.setattr(image_makers, "BATCHES_TOGETHER", together)
    generator = a_generator(seed, num_classes)
    other = copy.deepcopy(generator)
    if synchronised:
        convert_batch_norm(other)
    labels = torch.arange((BATCHES + 1) * SIZE).view(BATCHES + 1, SIZE) % max(num_classes, 1)
    latents = random(seed, BATCHES + 1, SIZE, 5)
    inputs = latents[:-1], labels[:-1], latents[-1], labels[-1]
    fakes, [images] = StepGenerator(generator, True)(*inputs)
    other_fakes, [other_images] = LayerwiseStepGenerator(other, True)(*inputs)
    torch.testing.assert_close(other_fakes, fakes, **EXACT)
    torch.testing.assert_close(other_images, images, **EXACT)
    assert len(fakes) == BATCHES
    assert not any(batch.requires_grad for batch in (*fakes, *other_fakes))
    towards = random(seed, *images.shape)
    for made in (images, other_images):
        made.backward(towards)
    for (name, parameter), same in zip(generator.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(same.grad, parameter.grad, msg=name, **EXACT)
    for name, buffer in generator.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer, msg=name, **EXACT)
    assert generator.get_buffer("norms.0.num_batches_tracked").item() == BATCHES + 1
    for maker in (StepGenerator(generator, True), LayerwiseStepGenerator(other, True)):
        assert maker(latents[:0], labels[:0], latents[-1], labels[-1])[0] == [], "a critic that takes no batch"


@pytest.mark.parametrize("norm_type", [nn.BatchNorm2d, SyncBatchNorm])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_group_of_batches_is_normalised_batch_by_batch(seed: int, norm_type: type[nn.BatchNorm2d]) -> None:
    """As a GPU takes the critic's; the last group, the generator's own, has one."""
    one_by_one, norm = (each(4, eps=1e-3, momentum=0.01).double() for each in (nn.BatchNorm2d, norm_type))
    for each in (one_by_one, norm):
        nn.init.uniform_(each.weight, generator=seeded(seed, "weight"))
        nn.init.uniform_(each.bias, generator=seeded(seed, "bias"))
    batches = random(seed, BATCHES + 1, SIZE, 4, 3, 5)
    with torch.no_grad():
        expected = [one_by_one(batch) for batch in batches]
        groups = normalise(norm, [batches[:-1].flatten(0, 1), batches[-1]], [BATCHES, 1])
    torch.testing.assert_close(torch.cat(groups), torch.cat(expected), **EXACT)
    for name, buffer in one_by_one.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer, msg=name, **EXACT)


@pytest.mark.parametrize(
    ("norm_type", "shape"),
    [
        (nn.BatchNorm1d, (SIZE, 4)),
        (nn.BatchNorm1d, (SIZE, 4, 5)),
        (nn.BatchNorm2d, (SIZE, 4, 3, 5)),
        (nn.BatchNorm3d, (SIZE, 4, 2, 3, 5)),
    ],
)
def test_every_batch_norm_of_a_users_network_is_converted(norm_type: type[nn.Module], shape: tuple[int, ...]) -> None:
    norm = nn.Sequential(norm_type(4)).double()
    other = copy.deepcopy(norm)
    convert_batch_norm(other)
    assert isinstance(other[0], SyncBatchNorm)
    for mode in (True, False):
        results = []
        for network in (norm.train(mode), other.train(mode)):
            inputs = random(1, *shape).requires_grad_()
            network.zero_grad()
            outputs = network(inputs)
            outputs.backward(random(2, *shape))
            gradients = [weight.grad for weight in network.parameters()]
            results.append([outputs, inputs.grad, *gradients, *network.buffers()])
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, **EXACT)


def test_under_autocast_the_generators_own_images_have_gradients() -> None:
    """The critic's, made first, cast the same weights where none are wanted."""
    generator = a_generator(0, 0).float()
    latents, labels = torch.rand(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, [images] = StepGenerator(generator, True)(latents, labels, latents[0], labels[0])
    images.float().sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
