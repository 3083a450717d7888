"""The training runs of several processes that test_trajectory.py compares, in one table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Config, OptimizerConfig
from pipeline.storage.checkpoint import Checkpoint, find
from pipeline.storage.run_folder import RunFolder
from tests.jobs import changed, tiny_config, train_many

STEPS = 14
Settings = dict[str, dict[str, Any]]
"""Section -> setting -> value, for `changed`."""

ADAM = OptimizerConfig(algorithm="adam")
VARIANTS: dict[str, Settings] = {
    "wgan": {"training": {"n_critic": 5}},
    "wgan_gp": {"training": {"objective": "wgan_gp", "gradient_penalty": 10.0, "clip_value": None}},
    "lsgan": {"training": {"objective": "lsgan", "clip_value": None}},
    "gan": {"training": {"objective": "gan", "clip_value": None}},
    "r1": {"training": {"objective": "gan", "r1_penalty": 10.0, "clip_value": None}},
    "rpgan": {
        "training": {
            "objective": "rpgan",
            "r1_penalty": 1.0,
            "r2_penalty": 2.0,
            "penalty_annealing": 10,
            "clip_value": None,
            "critic_optimizer": OptimizerConfig(algorithm="adam", final_beta2=0.99, annealing_updates=30),
        }
    },
    "crpgan": {"training": {"objective": "crpgan", "n_critic": 2, "r1_penalty": 1.0, "clip_value": None}},
    "acgan": {"training": {"objective": "acgan", "clip_value": None}},
    "acwgan": {"training": {"objective": "acwgan"}},
    "separate": {"training": {"critic_updates": "separate", "critic_fakes": "moving"}},
    "adam": {"training": {"critic_optimizer": ADAM, "generator_optimizer": ADAM}},
    "burn_in": {"training": {"burn_in_n_critic": 5, "burn_in_steps": 2, "burn_in_every": 4}},
    "spectral_norm": {"training": {"spectral_norm": True, "critic_updates": "separate"}},
    "augmented": {
        "training": {
            "objective": "wgan_gp",
            "gradient_penalty": 10.0,
            "clip_value": None,
            "diff_augment": ["color", "translation", "cutout"],
        },
        "data": {"horizontal_flip": True},
    },
}
SOURCES: dict[str, Settings] = {
    "resident": {"data": {"source": "resident"}},
    "streaming": {"data": {"source": "streaming", "lanes": 8, "workers": 0}},
}
WORKERS: Settings = {"data": {"source": "streaming", "lanes": 8, "workers": 1}}
"""Of which each costs a rank two seconds of a core: one run has them, and its batches are those without."""
ON_FOUR_RANKS = ("wgan", "augmented", *SOURCES)
"""Variants that four ranks train; test_ordinary_use.py has every shipped configuration there."""
RECIPES: dict[str, Settings] = {
    "burn_in": VARIANTS["burn_in"] | SOURCES["streaming"],
    "rpgan": VARIANTS["rpgan"] | SOURCES["streaming"],
    "spectral_norm": VARIANTS["spectral_norm"],
    "augmented": VARIANTS["augmented"],
}
"""That a resume could forget a part of."""
EXACT: Settings = {"runtime": {"precision": "float64"}, "training": {"batch_size": 32}}
BF16: Settings = {"runtime": {"precision": "bf16"}}
PARTS: dict[int, Settings] = {1: {"runtime": {"accumulation": 4}}, 2: {"runtime": {"accumulation": 2}}}
"""By the number of ranks: a first part, some between and a last one; and two parts, which cost half as much."""
GUIDE: Settings = {
    "network": {"generator": "tests.guide:Generator", "critic": "tests.guide:Critic", "options": {"hidden": 12}},
    "training": {"objective": "acgan", "clip_value": None},
}
"""The networks of the contributing guide."""
SCORED: Settings = {"evaluation": {"every": STEPS, "num_images": 60, "features": ["torch.nn:Flatten"]}}
LARGE: Settings = {"training": {"batch_size": 8, "n_critic": 1, "objective": "gan", "clip_value": None}}
"""On images of 64 x 64 x 3."""
STOPS = (1, 7, 12)
"""Mid-epoch and right after a checkpoint alike."""
ELASTIC = [(4, 2), (2, 4), (4, 1)]
"""Numbers of ranks before and after a stop at step 9."""


@dataclass(frozen=True)
class Run:
    """One run, in a folder of its name."""

    jobs: tuple[tuple[int, int], ...]
    """(number of ranks, last step) of the jobs that train it one after the other."""
    settings: tuple[Settings, ...] = field(default=())
    """Applied one after the other."""
    dataset: str = "tiny"

    def config(self, base: Config, name: str, last_step: int) -> Config:
        for settings in self.settings:
            base = changed(base, **settings)
        return changed(base, run={"name": name}, training={"steps": last_step})


def whole(world_size: int, *settings: Settings) -> Run:
    return Run(((world_size, STEPS),), settings)


RUNS: dict[str, Run] = {
    # The same trajectory at any number of ranks
    **{f"{name}-{w}": whole(w, chosen, EXACT) for name, chosen in (VARIANTS | SOURCES).items() for w in (1, 2)},
    **{f"{name}-4": whole(4, (VARIANTS | SOURCES)[name], EXACT) for name in ON_FOUR_RANKS},
    **{f"{name}-parts-{w}": whole(w, chosen, EXACT, PARTS[w]) for name, chosen in VARIANTS.items() for w in PARTS},
    # A wide clip keeps this small critic's scores well above their rounding error.
    **{f"wgan-float32-{w}": whole(w, {"training": {"clip_value": 0.3}}) for w in (1, 2, 4)},
    **{f"lsgan-float32-{w}": whole(w, VARIANTS["lsgan"]) for w in (1, 2, 4)},
    # Stopped and gone on
    **{
        f"whole-{source}-{w}": whole(w, chosen, {"run": {"checkpoint_every": 4}})
        for source, chosen in SOURCES.items()
        for w in (1, 2)
    },
    **{
        f"resumed-{source}-{w}-{stop}": Run(((w, stop), (w, STEPS)), (chosen, {"run": {"checkpoint_every": 4}}))
        for source, chosen in SOURCES.items()
        for w in (1, 2)
        for stop in STOPS
    },
    **{f"whole-{name}": whole(2, chosen) for name, chosen in RECIPES.items()},
    **{f"resumed-{name}": Run(((2, 7), (2, STEPS)), (chosen,)) for name, chosen in RECIPES.items()},
    **{
        f"elastic-{source}-{before}-{after}": Run(((before, 9), (after, STEPS)), (chosen, EXACT))
        for source, chosen in SOURCES.items()
        for before, after in ELASTIC
    },
    # Other networks
    **{f"guide-{w}": whole(w, GUIDE, EXACT, SCORED) for w in (1, 2)},
    "guide-resumed-2": Run(((2, 7), (2, STEPS)), (GUIDE, EXACT)),
    **{f"large-{w}": Run(((w, STEPS),), (EXACT, LARGE), "large") for w in (1, 2)},
    "large-resumed-2": Run(((2, 7), (2, STEPS)), (EXACT, LARGE), "large"),
    "workers": Run(((2, 9), (1, STEPS)), (WORKERS, EXACT)),
    "whole-48": whole(1, EXACT, {"training": {"batch_size": 48}}),
    "three": Run(((4, 9), (3, STEPS)), (EXACT, {"training": {"batch_size": 48}})),
    # Fewer digits
    **{f"lsgan-bf16-whole-{w}": whole(w, VARIANTS["lsgan"], BF16) for w in (1, 2)},
    **{f"lsgan-bf16-resumed-{w}": Run(((w, 7), (w, STEPS)), (VARIANTS["lsgan"], BF16)) for w in (1, 2)},
    **{f"lsgan-bf16-parts-{w}": whole(w, VARIANTS["lsgan"], BF16, PARTS[w]) for w in PARTS},
}


class Trained:
    """All of RUNS, trained; what they left."""

    def __init__(self, datasets: dict[str, Path], root: Path) -> None:
        self.root = root
        left: dict[str, list[tuple[Kind, Config]]] = {}
        for name, run in RUNS.items():
            data = {"dataset": str(datasets[run.dataset])}
            base = tiny_config(run={"root": str(root)}, data=data, training={"n_critic": 2})
            jobs = [(w, run.config(base, name, last_step)) for w, last_step in run.jobs]
            left[name] = [(Kind.of(config, w), config) for w, config in jobs]
        while any(left.values()):
            [(kind, _)] = Counter(jobs[0][0] for jobs in left.values() if jobs).most_common(1)
            configs = []
            for name, rest in left.items():
                now = [config for _, config in takewhile(lambda job: job[0] == kind, rest)]  # noqa: B023
                left[name] = rest[len(now) :]
                configs += now
            train_many(configs, kind.world_size)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Every tensor of the last checkpoint."""
        return self.checkpoint(name, STEPS).tensors()

    def checkpoint(self, name: str, step: int) -> Checkpoint:
        return find(RunFolder(self.root / name), step)

    def losses(self, name: str) -> Tensor:
        return losses(self.root / name)


def losses(folder: Path) -> Tensor:
    """(STEPS, 2): the critic's and the generator's of a run."""
    rows = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return torch.tensor([[row["critic_loss"], row["generator_loss"]] for row in rows])


@dataclass(frozen=True)
class Kind:
    """What runs must have in common to be trained by the same processes."""

    world_size: int
    bf16: bool

    @classmethod
    def of(cls, config: Config, world_size: int) -> Kind:
        return cls(world_size, config.runtime.precision == "bf16")
