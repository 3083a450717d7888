"""Whether every rank computes the same: steps of the run's networks that each rank takes alone, from the same inputs.

Ranks that train together can't tell: what one of them adds to a sum over all is in everybody's result.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from pipeline.checks.findings import Finding
from pipeline.checks.machine import find_dataset
from pipeline.config import Config
from pipeline.data.source import Batch
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.models.objectives import choose
from pipeline.rng import seeded
from pipeline.storage.checkpoint import sha256_of_tensor
from pipeline.storage.provenance import device_name
from pipeline.training.build import build_step
from pipeline.training.inputs import InputStream
from pipeline.training.state import build_state

ROUNDS, STEPS = 3, 3
"""A fault that comes and goes shows between rounds, which all begin at the same state."""
SUBJECT = "arithmetic"

Digests = dict[str, str]
"""Tensor of the state -> SHA-256 of its bytes after the last step."""


@dataclass(frozen=True)
class Computed:
    """What one rank found."""

    host: str
    kind: str
    """What must be equal for results to be equal in every bit: device, threads, torch."""
    rounds: list[Digests]


@dataclass(frozen=True)
class Noise:
    """Real images and labels without a dataset, the same on every rank."""

    num_images: int
    image_shape: tuple[int, int, int]
    num_classes: int
    device: torch.device

    def batches(self, first: int) -> Iterator[Batch]:
        while True:
            draws = seeded(0, "images to compare ranks with", first)
            images = torch.randint(256, (self.num_images, prod(self.image_shape)), dtype=torch.uint8, generator=draws)
            labels = torch.randint(max(self.num_classes, 1), (self.num_images,), generator=draws)
            yield Batch(images.view(-1, *self.image_shape).to(self.device), labels.to(self.device))
            first += 1

    def damage(self) -> str | None:
        return None


def compare_ranks(config: Config, runtime: Runtime) -> Iterator[list[Finding]]:
    """Every rank takes as many images as it computes with at once through the same steps, ROUNDS times. Without a
    dataset, which `examine` has told of, nothing is known of the images."""
    ranks, alone = runtime.ranks, runtime.alone()
    try:
        dataset = ranks.on_main(lambda: find_dataset(config))
    except UserError:
        return
    alone.captures = False
    images = max(1, config.training.batch_size // ranks.world_size // config.runtime.accumulation)
    config = replace(config, training=replace(config.training, batch_size=images))
    config = replace(config, runtime=replace(config.runtime, accumulation=1))
    rounds = [_take_steps(config, alone, dataset.image_shape, dataset.num_classes) for _ in range(ROUNDS)]
    kind = f"{device_name(runtime.device, len(runtime.cores))}, {torch.get_num_threads()} threads, {torch.__version__}"
    yield findings(ranks.gather(Computed(os.uname().nodename, kind, rounds)))


def _take_steps(config: Config, alone: Runtime, image_shape: tuple[int, int, int], num_classes: int) -> Digests:
    objective = choose(config.training)
    num_classes = num_classes if objective.classifies else 0
    state = build_state(config, image_shape, num_classes, alone.device, alone.scaler)
    images = Noise(config.training.batch_size, image_shape, num_classes, alone.device)
    inputs, step = InputStream(config, state, images, alone.ranks, False), build_step(config, objective, state, alone)
    for _ in range(STEPS):
        step(inputs.take())
        state.step += 1
    return {name: sha256_of_tensor(tensor.detach().cpu().contiguous()) for name, tensor in state.tensors().items()}


def findings(computed: list[Computed]) -> list[Finding]:
    """`computed`: of each rank. Errors name ranks and hosts."""
    errors, steady = [], []
    for rank, own in enumerate(computed):
        if odd := _first_difference(own.rounds[0], *own.rounds[1:]):
            text = f"rank {rank} on {own.host} got two results from the same {STEPS} steps (in {odd})"
            errors.append(f"{text}; its processor, GPU or memory is faulty: take {own.host} out of the job")
        else:
            steady.append(rank)
    for kind in sorted({own.kind for own in computed}):
        alike = [rank for rank in steady if computed[rank].kind == kind]
        results = Counter(str(computed[rank].rounds[0]) for rank in alike)
        if len(results) < 2:
            continue
        (usual, most), (_, second) = results.most_common(2)
        reference = computed[next(rank for rank in alike if str(computed[rank].rounds[0]) == usual)].rounds[0]
        odd_ranks = [rank for rank in alike if str(computed[rank].rounds[0]) != usual]
        told = ", ".join(f"{rank} on {computed[rank].host}" for rank in (alike if most == second else odd_ranks))
        where = _first_difference(reference, *(computed[rank].rounds[0] for rank in odd_ranks))
        if most == second:
            errors.append(f"rank {told} disagree after the same {STEPS} steps (in {where}); ask again with more ranks")
        else:
            text = f"rank {told} computes otherwise than the {most} others like it, after the same {STEPS} steps"
            errors.append(f"{text} (in {where}); its processor, GPU or memory is faulty: take it out of the job")
    if errors:
        return [Finding("error", SUBJECT, text) for text in errors]
    kinds = Counter(own.kind for own in computed)
    each = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return [Finding("ok", SUBJECT, f"the same {STEPS} steps gave the same bits {ROUNDS} times on all ranks ({each})")]


def _first_difference(reference: Digests, *others: Digests) -> str:
    """The first tensor in which any differs from the reference; "" if none does."""
    return next((name for name, digest in reference.items() if any(other[name] != digest for other in others)), "")
