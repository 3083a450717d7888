"""Scores made-up features, dealt unevenly, in several batch sizes: `torchrun ... metrics_many.py OUT SIZE ...`.

Every rank writes what torchmetrics' own compute gave it, for each batch size, as OUT.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection

from pipeline.evaluation.metrics import (
    Authenticity,
    ClassScores,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    ManifoldScores,
    SlicedWasserstein,
)

NUM_FAKES, NUM_REALS, WIDTH, CLASSES = 2_501, 3_087, 12, 4
CUTS = {1: (0.0, 1.0), 2: (0.0, 0.3, 1.0), 4: (0.0, 0.4, 0.4, 0.9, 1.0)}
"""Where the images are cut among so many ranks; of four one has none."""


def made_up(seed: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return (torch.randn(num_images, WIDTH, generator=generator) @ mixing + 1).relu()


def main(output: str, *batch_sizes: str) -> None:
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1:
        dist.init_process_group("gloo")
    results = []
    for batch_size in map(int, batch_sizes):
        metrics = MetricCollection(
            {
                "fid": FrechetDistance(WIDTH),
                "inception_score": InceptionScore(CLASSES),
                "kid": KernelDistance(WIDTH, keep=1000),
                "manifold": ManifoldScores(WIDTH, keep=300),
                "sliced_wasserstein": SlicedWasserstein(WIDTH, keep=300),
                "authenticity": Authenticity(WIDTH, scored=150, keep=1000),
                "classes": ClassScores(WIDTH, CLASSES),
            }
        )
        for real, features in ((False, made_up(0, NUM_FAKES)), (True, made_up(1, NUM_REALS))):
            first, last = (int(len(features) * CUTS[world_size][cut]) for cut in (rank, rank + 1))
            for indices in torch.split(torch.arange(first, last), batch_size):
                rows = features[indices]
                metrics.update(features=rows, logits=rows[:, :CLASSES], real=real, indices=indices)
        results.append({name: score.tolist() for name, score in metrics.compute().items()})
    Path(f"{output}.{rank}").write_text(json.dumps(results))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
