"""What only the doctor checks: whether this machine and its neighbours can carry the run.

A check returns a line about what is in order ("" if there is nothing to say), and raises UserError or OSError for what
is not; `run_check` makes a finding of either. `examine` runs them all.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch

from pipeline.checks.settings import CHECKS, Plan
from pipeline.config import Config
from pipeline.data import Dataset, Shard, existing_dataset
from pipeline.data.dataset import read_bytes, scheme
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.process import Runtime
from pipeline.distributed.slurm import job_seconds_left
from pipeline.errors import UserError
from pipeline.evaluation.features import load_features, published_weights
from pipeline.storage.checkpoint import committed
from pipeline.storage.run_folder import RunFolder

CHECKSUM_SECONDS = 3.0
"""A rank begins no further checksum of the sample after this time."""
MAX_SHARDS_SHOWN = 3
"""How many damaged shards a rank names."""
SIGNAL_SECONDS = 120
"""Part of the time limit that launch/slurm/train.sbatch reserves to save and stop."""
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's output."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    """What is the case, and after a semicolon or colon what to do about it."""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject}: {self.text}"


class Caution(UserError):
    """Raised by a check for something that the run will survive: a warning."""


def run_check(subject: str, check: Callable[[], str]) -> Finding:
    """Runs a check and returns its finding, or what it raised as one."""
    try:
        return Finding("ok", subject, check())
    except (UserError, OSError) as error:
        return Finding("warning" if isinstance(error, Caution) else "error", subject, str(error))


def run_check_on_all_ranks(ranks: Ranks, subject: str, check: Callable[[], str]) -> list[Finding]:
    """Runs a check on every rank; returns all warnings and errors, or if there are none the first rank's finding."""
    by_rank = ranks.gather(run_check(subject, check))
    findings = []
    for finding in dict.fromkeys(finding for finding in by_rank if finding.level != "ok"):
        seen_by = [str(rank) for rank, other in enumerate(by_rank) if other == finding]
        where = "" if len(seen_by) == len(by_rank) else f"on rank {', '.join(seen_by)}: "
        findings.append(replace(finding, text=f"{where}{finding.text}"))
    return findings or by_rank[:1]


def examine(config: Config, ranks: Ranks, all_checksums: bool) -> Iterator[Finding]:
    """Yields the findings of one check after the other, the same on all ranks. Every rank must take them all."""
    dataset: Dataset | None = None

    def check_dataset() -> str:
        nonlocal dataset
        dataset = ranks.on_main(lambda: find_dataset(config))
        return check_shards(dataset, ranks, all_checksums)

    def on_main(subject: str, check: Callable[..., str], *arguments: object) -> Finding:
        return ranks.on_main(lambda: run_check(subject, lambda: check(*arguments)))

    yield from run_check_on_all_ranks(ranks, "data.dataset", check_dataset)
    plan = Plan(config, ranks.world_size, dataset)
    for subject, check in CHECKS.items():
        yield on_main(subject, check, plan)
    for name in config.evaluation.features:
        yield on_main("evaluation.features", check_features, plan, name)
    yield from run_check_on_all_ranks(ranks, "run.root", lambda: check_writable(config.folder, ranks))
    yield on_main("disk", check_disk, plan)
    yield on_main("time limit", lambda: check_time(config, job_seconds_left()))


def check_ranks(runtime: Runtime) -> str:
    """Checks that the ranks sum 4 MiB on the device correctly, and a flag on the host, as checkpoints do. Raises
    RuntimeError if they can't reach each other."""
    ranks, world_size, device = runtime.ranks, runtime.ranks.world_size, runtime.hardware["device"]
    if world_size == 1:
        return f"1, on {device}"
    seconds = []
    for _ in range(3):
        values = torch.full((MIB,), float(ranks.rank + 1), device=runtime.device)
        started = time.monotonic()
        ranks.sum(values)
        low, high = values.min().item(), values.max().item()
        seconds.append(time.monotonic() - started)
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    if not low == high == world_size * (world_size + 1) / 2 or not ranks.any(ranks.rank == world_size - 1):
        raise UserError(f"{backend} sums 1, ..., {world_size} to {low} to {high}; check the network and NCCL's version")
    return f"{world_size}, on {device}; {backend} sums 4 MiB correctly in {min(seconds) * 1e3:.1f} ms"


def find_dataset(config: Config) -> Dataset:
    """Opens the dataset. Raises Caution for a known one that the training will prepare, UserError for another that is
    missing or damaged."""
    if (dataset := existing_dataset(config.data)) is None:
        text = f"{config.data.dataset} is not prepared in {config.data.root}, the training will fetch it first"
        raise Caution(f"{text}; run pipeline/prepare.py where there is a network")
    return dataset


def check_shards(dataset: Dataset, ranks: Ranks, all_checksums: bool) -> str:
    """Checks this rank's share of the shards: the presence and size of each file, the SHA-256 of a sample or of all.
    Shards behind URLs are only read if all checksums are asked for."""
    shards = [shard for split in dataset.splits.values() for shard in split]
    mine = shards[ranks.rank :: ranks.world_size]
    random.Random().shuffle(mine)  # another sample each time, without the random numbers of the process
    deadline = math.inf if all_checksums else time.monotonic() + CHECKSUM_SECONDS
    num_hashed, damaged = 0, []
    for shard in mine:
        location = dataset.locate(shard)
        is_hashed = time.monotonic() < deadline and (all_checksums or not scheme(location))
        num_hashed += is_hashed
        if problem := _find_damage(shard, location, is_hashed):
            damaged.append(problem)
    if damaged:
        text = f"{len(damaged)} of {len(mine)} shards damaged: {', '.join(damaged[:MAX_SHARDS_SHOWN])}"
        raise UserError(f"{text}; copy them again, or prepare the dataset again")
    images = " and ".join(f"{dataset.num_images(split)} {split}" for split in dataset.splits)
    where = "" if ranks.world_size == 1 else " on the first rank"
    return f"{dataset.name}, {images} images in {len(shards)} shards, {num_hashed} of {len(mine)} hashed{where}"


def _find_damage(shard: Shard, location: str, is_hashed: bool) -> str | None:
    try:
        if not scheme(location) and (num_bytes := Path(location).stat().st_size) != shard.num_bytes:
            return f"{location} has {num_bytes} bytes, the manifest says {shard.num_bytes}"
        if is_hashed and sha256(read_bytes(location)).hexdigest() != shard.sha256:
            return f"{location} has not the manifest's SHA-256"
    except OSError as error:
        return f"{location} can't be read ({error.strerror or error})"
    return None


def check_features(plan: Plan, name: str) -> str:
    """Checks that a feature space takes this dataset, and that its weights are there and load."""
    config = plan.config.evaluation
    if config.every is None:
        return f"{name}, not used, evaluation.every is null"
    weights = published_weights(name)
    if weights and not (path := weights.path(config)).is_file():
        text = f"{weights.what} are not at {path}, the evaluation will download them"
        raise Caution(f"{text}; put them there where there is no network")
    if plan.dataset is None:
        return ""
    load_features(name, plan.dataset, torch.device("cpu"), config)
    return f"{name}, its weights load"


def check_writable(folder: Path, ranks: Ranks) -> str:
    """Checks that every rank can write where the run's folder will be, and that all see the same place."""
    folder, name, problem = _existing(folder), "", ""
    with contextlib.ExitStack() as stack:
        try:
            name = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder)).name
        except OSError as error:
            problem = f"can't be written to ({error.strerror}); choose another run.root"
        if (first := ranks.broadcast(name)) and not problem and not Path(first).exists():
            problem = "is not the first rank's; choose a run.root on a file system that all nodes share"
        ranks.any(False)  # all have looked: the files may go
    if problem:
        raise UserError(f"{folder} {problem}")
    return f"{folder} can be written to by all ranks"


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def check_disk(plan: Plan) -> str:
    """Checks the free space against all checkpoints that will be kept and one being written, less those on the disk."""
    if plan.dataset is None:
        return ""
    run, training = plan.config.run, plan.config.training
    optimizers, checkpoint = (training.generator_optimizer, training.critic_optimizer), 0
    for network, optimizer, copies in zip(plan.networks(plan.dataset), optimizers, (2, 1), strict=True):
        checkpoint += copies * sum(tensor.nbytes for tensor in network.state_dict().values())  # 2: with the average
        checkpoint += {"rmsprop": 1, "adam": 2}[optimizer.algorithm] * sum(p.nbytes for p in network.parameters())
    keep = run.keep_last + (training.steps // math.lcm(run.checkpoint_every, run.keep_every) if run.keep_every else 0)
    saves = -(-training.steps // run.checkpoint_every)
    if run.keep_best is not None:
        keep, saves = keep + 1, saves + -(-training.steps // (plan.config.evaluation.every or training.steps))
    count = min(keep, saves) + 1
    files = [path for folder in committed(RunFolder(plan.config.folder)) for path in folder.iterdir()]
    needed = max(checkpoint, count * checkpoint - sum(path.stat().st_size for path in files))
    folder = _existing(plan.config.folder)
    free = shutil.disk_usage(folder).free
    text = f"{free / MIB:,.1f} MiB free in {folder}, {count} checkpoints need {needed / MIB:,.1f}"
    if free < needed:
        raise UserError(f"{text}; make room, or lower run.keep_last or raise run.keep_every")
    return text


def check_time(config: Config, seconds_left: float | None) -> str:
    """Checks the job's time limit against the time between two checkpoints, at the pace of the run's newest metrics."""
    if seconds_left is None:
        return "none is known here"
    usable = seconds_left - SIGNAL_SECONDS
    if usable <= 0:
        raise UserError(f"the job has {seconds_left:.0f} s left and keeps {SIGNAL_SECONDS} s to save; raise --time")
    every, step_seconds = config.run.checkpoint_every, _step_seconds(config)
    if step_seconds is None:
        return f"{usable:.0f} s to train; how long a step takes is not known before the run's first metrics"
    text = f"{usable:.0f} s to train; a checkpoint every {every} steps comes every {every * step_seconds:.0f} s"
    if every * step_seconds > usable:
        fix = f"set run.checkpoint_every to {max(1, int(usable / step_seconds / 4))}, or raise --time"
        raise Caution(f"{text}, so the loss of a node would cost the whole job; {fix}")
    return text


def _step_seconds(config: Config) -> float | None:
    """Returns the mean seconds of the steps until the next checkpoint, a burn-in's included; None without metrics."""
    training, every = config.training, config.run.checkpoint_every
    try:
        line = json.loads(RunFolder(config.folder).metrics.read_text().splitlines()[-1])
        images = training.critic_iterations(line["step"], line["step"] + every) * training.batch_size
        return float(images / line["images_per_second"] / every)
    except (OSError, ValueError, IndexError, KeyError):
        return None
