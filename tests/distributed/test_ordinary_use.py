"""What the product is for: every shipped configuration, on several ranks, with everything on that a user has on.

A run is a function of configuration, dataset, seed and step. How many ranks there are, how many micro-batches each of
them takes, and what looks at the run on the way (evaluations, samples, checkpoints, trackers, a stop and a resume) does
not change it. Runs are compared with bare ones: nothing is on there, and most of them have a single rank. To try all
combinations would take thousands of runs; the rows of a table that holds every pair of settings are enough to find what
two settings do to each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import Config, RuntimeConfig, make_parser, parse
from pipeline.data import Dataset, load_dataset
from pipeline.data.prepare import prepare_npz
from pipeline.data.resident import load_split
from pipeline.distributed.process import Runtime
from pipeline.evaluation.scorer import Scorer
from pipeline.export.generator_file import generator_of
from pipeline.storage.checkpoint import Checkpoint, find
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, changed, restoring_process, train_many

STEPS, MIDDLE = 4, 2
"""The middle of a run, where it is evaluated, and stopped if it is resumed."""
SETTINGS: dict[str, Sequence[Any]] = {
    "name": sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")),
    "world_size": (1, 2, 4),
    "accumulation": (1, 2),
    "source": ("resident", "streaming"),
    "scores": (None, "evaluation", "keep_best"),
    "weights": ("ema", "raw"),
    "samples": (False, True),
    "checkpoints": (False, True),
    "trackers": (False, True),
    "resumed": (False, True),
}
Pair = frozenset[tuple[str, Any]]
"""Two settings with a value each."""


@dataclass(frozen=True)
class Row:
    """A run's settings: see SETTINGS. By default nothing is on."""

    name: str
    world_size: int = 1
    accumulation: int = 1
    source: str = "resident"
    scores: str | None = None
    weights: str = "ema"
    samples: bool = False
    checkpoints: bool = False
    trackers: bool = False
    resumed: bool = False

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))

    @property
    def pairs(self) -> set[Pair]:
        return {frozenset(pair) for pair in combinations(vars(self).items(), 2)}

    @property
    def off(self) -> Row:
        """The same ranks and micro-batches with nothing on."""
        return Row(self.name, self.world_size, self.accumulation, self.source)

    @property
    def bare(self) -> Row:
        """A single rank, a single micro-batch, and nothing on. The two sources draw different batches."""
        return Row(self.name, source=self.source)

    def configs(self, root: Path, dataset: Path) -> list[Config]:
        """The jobs of the run, made small, one after the other."""
        file = ROOT / f"configs/{self.name}.yaml"
        config = parse(make_parser("test"), ["--config", str(file)])[0]
        config = changed(
            config,
            run={
                **{"root": str(root), "name": str(self), "log_every": 1},
                "trackers": ["tensorboard"] if self.trackers else [],
                "sample_every": 1 if self.samples else STEPS,
                "checkpoint_every": 1 if self.checkpoints else STEPS,
                "keep_best": "fid" if self.scores == "keep_best" else None,
            },
            data={"dataset": str(dataset), "source": self.source, "workers": 0},
            network={"width": 0.03, "latent_dim": 8},
            training={"batch_size": 8, "n_critic": min(config.training.n_critic, 2), "steps": STEPS},
            evaluation={
                "every": MIDDLE if self.scores else None,
                **{"num_images": 200, "features": ["mnist"], "weights": self.weights},
            },
            runtime={"device": "cpu", "threads": 1, "precision": "float64", "accumulation": self.accumulation},
        )
        return [changed(config, training={"steps": MIDDLE}), config] if self.resumed else [config]


def all_pairs() -> set[Pair]:
    return {
        frozenset([(one, left), (other, right)])
        for one, other in combinations(SETTINGS, 2)
        for left in SETTINGS[one]
        for right in SETTINGS[other]
    }


def covering_rows(candidates: int = 60) -> list[Row]:
    """Rows that hold every pair of settings. Each is the best of some random ones around a pair that is still missing
    (Cohen et al. 1997, "The AETG System")."""
    random, rows, missing = Random(0), list[Row](), all_pairs()
    while missing:
        needed = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        drawn = [
            Row(**{key: random.choice(values) for key, values in SETTINGS.items()} | needed) for _ in range(candidates)
        ]
        rows.append(max(drawn, key=lambda row: len(row.pairs & missing)))
        missing -= rows[-1].pairs
    return rows


ROWS = covering_rows()


def test_the_table_holds_every_pair_of_settings() -> None:
    assert set.union(*(row.pairs for row in ROWS)) == all_pairs()


@dataclass(frozen=True)
class Trained:
    """The runs of the table, and the bare ones."""

    root: Path
    dataset: Dataset

    def checkpoint(self, row: Row) -> Checkpoint:
        return find(RunFolder(self.root / str(row)), STEPS)

    def lines(self, row: Row) -> Tensor:
        """(STEPS, 4) of metrics.jsonl."""
        lines = [json.loads(line) for line in RunFolder(self.root / str(row)).metrics.read_text().splitlines()]
        keys = "step", "critic_loss", "generator_loss", "critic_grad_norm"
        return torch.tensor([[line[key] for key in keys] for line in lines], dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(mnist_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("ordinary")
    images, labels = load_split(mnist_dataset, "test")
    files = {"train": root / "train.npz", "test": root / "test.npz"}
    for file, rows in zip(files.values(), (slice(0, 200), slice(5000, 5100)), strict=True):
        np.savez(file, images=images[rows].numpy(), labels=labels[rows].numpy())
    dataset = load_dataset(prepare_npz(root, "digits", files, kind="mnist").folder)
    runs = dict.fromkeys([*(row.bare for row in ROWS), *(row.off for row in ROWS), *ROWS])
    for world_size in SETTINGS["world_size"]:
        together = [row for row in runs if row.world_size == world_size]
        train_many([config for row in together for config in row.configs(root / "runs", dataset.folder)], world_size)
    return Trained(root / "runs", dataset)


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((tensor - right[name]).abs().max().item() for name, tensor in left.items())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_is_on_changes_no_bit(trained: Trained, row: Row) -> None:
    on, off = trained.checkpoint(row).tensors(), trained.checkpoint(row.off).tensors()
    assert not [name for name, tensor in on.items() if not torch.equal(tensor, off[name])]
    assert torch.equal(trained.lines(row), trained.lines(row.off))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_run_is_the_bare_run_of_one_rank(trained: Trained, row: Row) -> None:
    weights = trained.checkpoint(row).tensors(), trained.checkpoint(row.bare).tensors()
    assert largest_difference(*weights) < 1e-8
    assert (trained.lines(row) - trained.lines(row.bare)).abs().max() < 1e-8


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with restoring_process():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("row", [row for row in ROWS if row.scores and row.world_size > 1], ids=str)
def test_scores_are_those_of_one_rank(trained: Trained, row: Row, runtime: Runtime, tmp_path: Path) -> None:
    """Of the bare run's checkpoint, which is scored here, in a process alone."""
    [*_, config] = row.configs(tmp_path, trained.dataset.folder)
    scorer = Scorer(config.evaluation, trained.dataset, runtime, config.training.seed)
    generator = generator_of(trained.checkpoint(row.bare), row.weights)
    expected = scorer.score_generator(generator, tmp_path / "scores.json", {})["features"]["mnist"]
    found = json.loads(RunFolder(trained.root / str(row)).scores(STEPS).read_text())["features"]["mnist"]
    for key in ("fid", "kid_mean"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6), key
