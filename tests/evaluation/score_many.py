"""Scores the same images with several batch sizes: `torchrun ... score_many.py DATASET OUT N BATCH_SIZE ...`.

The images are real digits blended with those of a generator, so that every score is far from its extremes and the
generator's float32 rounding takes part. Every rank writes what it was given as OUT.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import EvaluationConfig, NetworkConfig
from pipeline.data import load_dataset
from pipeline.data.resident import load_split
from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.evaluate import critic_estimates, evaluate_images, share_of_real_images
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features.classifier import MnistFeatures
from pipeline.models.networks import Critic, Generator, initialise
from pipeline.rng import evaluation_latents, seeded


def main(folder: str, output: str, num_images: str, *batch_sizes: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    ranks = Ranks.without_group().with_own_group()
    dataset = load_dataset(folder)
    digits, _ = load_split(dataset, "test")
    extractor = MnistFeatures(torch.device("cpu"))
    generator = Generator(NetworkConfig(width=0.1), dataset.image_shape, 0).eval()
    initialise(generator, seeded(0, "test"))
    critic = Critic(NetworkConfig(width=0.1), dataset.image_shape)
    initialise(critic, seeded(0, "critic"))
    real = {split: share_of_real_images(dataset, split, ranks) for split in ("train", "test")}
    share = ranks.share(250, 100)
    estimates = critic_estimates(critic, real | {"generated": digits[share.start : share.stop]}, ranks)
    calls: list[tuple[int, int]] = []

    @torch.inference_mode()
    def render(start: int, stop: int) -> Tensor:
        calls.append((start, stop))
        real = digits[torch.arange(start, stop) % len(digits)] / 255
        images: Tensor = 0.8 * real + 0.2 * generator(evaluation_latents(0, start, stop, 100))
        return (images * 255).round().to(torch.uint8)

    results = []
    for batch_size in map(int, batch_sizes):
        calls.clear()
        scores = evaluate_images(
            ImageSet(int(num_images), render, torch.arange(int(num_images)) % 10),
            dataset,
            [extractor],
            EvaluationConfig(batch_size=batch_size),
            seed=3,
            ranks=ranks,
        )
        results.append({"scores": scores["mnist"], "calls": list(calls), "critic": estimates})
    Path(f"{output}.{ranks.rank}").write_text(json.dumps(results))
    if ranks.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
