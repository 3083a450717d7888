"""Checks a run before it starts: `accelerate launch pipeline/doctor.py [--KEY VALUE ...] [--checksums sampled|all]`.

Give it the launcher and the settings of the training, before that is submitted or as the first act of its job. Prints a
line for each finding, `ok|warning|error  subject: finding; fix`, and exits with 2 if one is an error. It neither makes
nor changes a run: it only makes a file for a moment in the nearest folder above the run that exists. Takes less than
ten seconds, unless all checksums of a large dataset are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from pipeline.config import Config, make_parser, parse
from pipeline.data import KNOWN, DataError, Dataset, dataset_folder, load_dataset, locations, source_kind
from pipeline.data.manifest import FILE_NAME, Shard
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.errors import EXIT_USER_ERROR, UserError
from pipeline.evaluation.features import default_inception_weights, load_features
from pipeline.models.objectives import choose
from pipeline.rng import rank_slice
from pipeline.storage.checkpoint import committed
from pipeline.training.state import build_state
from pipeline.training.trainer import check_run_folder

PATIENCE_SECONDS = 60
"""Longest wait for another rank."""
CHECKSUM_SECONDS = 3.0
"""A rank begins no further sampled checksum after this."""
SHOWN_SHARDS = 3
"""Damaged shards that a rank tells one by one."""
SIGNAL_SECONDS = 120
"""What launch/slurm/train.sbatch keeps of its time limit, to save and stop."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    """What was found; after a semicolon or colon what to do about it."""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject}: {self.text}"


Check = Callable[[], Iterator[Finding]]


def main() -> int:
    parser = make_parser("Check a run before it starts: ranks, data, features, folder, disk, time limit.")
    parser.add_argument(
        "--checksums", type=Literal["sampled", "all"], default="sampled", help="verify a few seconds' worth, or all"
    )
    config, arguments = parse(parser)
    patience = min(config.runtime.timeout_seconds, PATIENCE_SECONDS)
    try:
        runtime = Runtime(dataclasses.replace(config.runtime, timeout_seconds=patience))
        communication = _on_every_rank("ranks", lambda: check_ranks(runtime), runtime)
    except RuntimeError as error:
        fix = "name the interface that the nodes share (NETWORK_INTERFACE in launch/slurm/site.sh)"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(Finding("error", "ranks", f"they can't talk to each other ({reason}); {fix}"), flush=True)
        return EXIT_USER_ERROR
    healthy = True
    try:
        for findings in (communication, *examine(config, runtime, arguments.checksums == "all")):
            for finding in findings:
                healthy = healthy and finding.level != "error"
                if runtime.is_main:
                    print(finding, flush=True)
    finally:
        runtime.close()
    return 0 if healthy else EXIT_USER_ERROR


def examine(config: Config, runtime: Runtime, all_checksums: bool) -> Iterator[list[Finding]]:
    """The findings of one check after the other, the same on all ranks. Every rank must take them all."""
    dataset: Dataset | None = None
    try:
        dataset = runtime.on_main(lambda: find_dataset(config))
    except DataError as error:
        yield [Finding("error", "data.dataset", str(error))]
    else:
        if dataset is None:
            text = f"{config.data.dataset} is not prepared in {config.data.root}, the training will fetch it first"
            yield [Finding("warning", "data.dataset", f"{text}; run pipeline/prepare.py where there is a network")]
    if dataset is not None:
        found = dataset
        yield _on_every_rank("data.dataset", lambda: check_shards(found, runtime, all_checksums), runtime)
    for subject, check in (
        ("training", lambda: check_shares(config, dataset, runtime.world_size)),
        ("evaluation.features", lambda: check_features(config, dataset)),
        ("run.name", lambda: check_run(config, dataset)),
    ):
        yield _on_main(subject, check, runtime)
    yield _on_every_rank("run.root", lambda: check_folder(config, runtime), runtime)
    for subject, check in (
        ("disk", lambda: check_disk(config, dataset)),
        ("time limit", lambda: check_time(config, runtime.job_seconds_left())),
    ):
        yield _on_main(subject, check, runtime)


def _findings(subject: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except (UserError, OSError) as error:
        return [Finding("error", subject, str(error))]


def _on_main(subject: str, check: Check, runtime: Runtime) -> list[Finding]:
    return runtime.on_main(lambda: _findings(subject, check))


def _on_every_rank(subject: str, check: Check, runtime: Runtime) -> list[Finding]:
    """What any rank has against it; if none has anything, what the first one says."""
    own = _findings(subject, check)
    if runtime.world_size == 1:
        return own
    everyone = gather_object([(runtime.rank, finding) for finding in own])
    ranks: dict[Finding, list[int]] = {}
    for rank, finding in everyone:
        ranks.setdefault(finding, []).append(rank)
    against = [
        dataclasses.replace(finding, text=f"on rank {', '.join(map(str, on))}: {finding.text}")
        for finding, on in ranks.items()
        if finding.level != "ok"
    ]
    return against or [finding for finding, on in ranks.items() if on[0] == 0]


# -- the checks --------------------------------------------------------------------------------------------------------


def check_ranks(runtime: Runtime) -> Iterator[Finding]:
    """A sum over all ranks of 4 MiB with a known result on the device; on the host, as for checkpoints, a smaller one.

    Raises RuntimeError when the ranks can't reach each other.
    """
    world_size, device = runtime.world_size, runtime.environment()["device"]
    if world_size == 1:
        yield Finding("ok", "ranks", f"1, on {device}")
        return
    seconds = []
    for _ in range(3):
        values = torch.full((MIB,), float(runtime.rank + 1), device=runtime.device)
        started = time.monotonic()
        dist.all_reduce(values)
        low, high = values.min().item(), values.max().item()
        seconds.append(time.monotonic() - started)
    backend, expected = dist.get_backend(), world_size * (world_size + 1) / 2
    if not low == high == expected or not runtime.any_rank(runtime.rank == world_size - 1):
        text = f"{backend} sums 1, ..., {world_size} to {low} to {high}; check the network and NCCL's version"
        yield Finding("error", "ranks", text)
        return
    text = f"{world_size}, on {device}; {backend} sums 4 MiB correctly in {min(seconds) * 1e3:.1f} ms"
    yield Finding("ok", "ranks", text)


def find_dataset(config: Config) -> Dataset | None:
    """None: a known one that the training will prepare. Raises DataError."""
    folder = dataset_folder(config.data)
    if config.data.dataset in KNOWN and not (Path(folder) / FILE_NAME).exists():
        return None
    return load_dataset(folder, allow_shell_urls=config.data.allow_shell_urls)


def check_shards(dataset: Dataset, runtime: Runtime, all_checksums: bool) -> Iterator[Finding]:
    """Each rank looks at its share of the shards: presence and size of each file, SHA-256 of a sample or all.

    Shards behind URLs are only read if all checksums are asked for.
    """
    shards = [shard for split in dataset.splits.values() for shard in split]
    mine = shards[runtime.rank :: runtime.world_size]
    random.shuffle(mine)  # another sample each time
    deadline = math.inf if all_checksums else time.monotonic() + CHECKSUM_SECONDS
    verified, damaged = 0, []
    for shard in mine:
        location = dataset.locate(shard)
        hashed = time.monotonic() < deadline and (all_checksums or not locations.scheme(location))
        if problem := _problem(shard, location, hashed):
            damaged.append(problem)
        verified += hashed
    for problem in damaged[:SHOWN_SHARDS]:
        yield Finding("error", "data.dataset", f"{problem}; copy that file again, or prepare the dataset again")
    if len(damaged) > SHOWN_SHARDS:
        yield Finding("error", "data.dataset", f"{len(damaged) - SHOWN_SHARDS} more shards are missing or damaged")
    if not damaged:
        images = " and ".join(f"{dataset.num_images(split)} {split}" for split in dataset.splits)
        where = "" if runtime.world_size == 1 else " on the first rank"
        text = f"{dataset.name}, {images} images in {len(shards)} shards, {verified} of {len(mine)} hashed{where}"
        yield Finding("ok", "data.dataset", text)


def _problem(shard: Shard, location: str, hashed: bool) -> str | None:
    try:
        if not locations.scheme(location) and (num_bytes := Path(location).stat().st_size) != shard.num_bytes:
            return f"{location} has {num_bytes} bytes, the manifest says {shard.num_bytes}"
        if hashed and sha256(locations.read_bytes(location)).hexdigest() != shard.sha256:
            return f"{location} is damaged, its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{location} can't be read ({error.strerror or error})"
    return None


def check_shares(config: Config, dataset: Dataset | None, world_size: int) -> Iterator[Finding]:
    """Batch and lanes among the ranks; objective and labels. Raises UserError."""
    training = config.training
    rows = rank_slice(training.batch_size, 0, world_size)
    text = f"training.batch_size {training.batch_size} is {rows.stop} a rank"
    objective = choose(training)
    if dataset is not None:
        if objective.classifies and dataset.num_classes < 2:
            raise UserError(f"training.objective is {training.objective}, but {dataset.name} has no labels")
        if source_kind(config.data, dataset) == "streaming":
            StreamingSource(
                dataset,
                lanes=config.data.lanes,
                workers=config.data.workers,
                batch_size=training.batch_size,
                seed=training.seed,
                rank=0,
                world_size=world_size,
                device=torch.device("cpu"),
            )
            text += f", data.lanes {config.data.lanes} are {config.data.lanes // world_size}"
    yield Finding("ok", "training", text)


def check_features(config: Config, dataset: Dataset | None) -> Iterator[Finding]:
    """The weights of each feature space, and whether it takes these images. Raises UserError."""
    evaluation = config.evaluation
    if evaluation.every is None:
        yield Finding("ok", "evaluation.features", "not used, evaluation.every is null")
        return
    weights = Path(evaluation.inception_weights) if evaluation.inception_weights else default_inception_weights()
    for name in evaluation.features:
        if name == "inception" and not weights.is_file():
            if evaluation.inception_weights:
                raise UserError(f"evaluation.inception_weights is {weights}: no such file; give the path of one")
            text = f"no Inception weights at {weights}, the evaluation will download them"
            yield Finding("warning", "evaluation.features", f"{text}; put them there where there is no network")
        elif dataset is not None:
            load_features(name, torch.device("cpu"), dataset.image_shape, weights)
            yield Finding("ok", "evaluation.features", f"{name}, its weights load")


def check_run(config: Config, dataset: Dataset | None) -> Iterator[Finding]:
    """Whether the folder is free, or holds this very run. Raises UserError."""
    environment = check_run_folder(config)
    if environment is None:
        yield Finding("ok", "run.name", f"{config.folder} is free")
    elif dataset is not None and environment["dataset_fingerprint"] != dataset.fingerprint:
        text = f"{config.folder} was trained on another version of {dataset.name}"
        yield Finding("error", "run.name", f"{text}; use another run.name")
    else:
        yield Finding("ok", "run.name", f"{config.folder} holds this run, which will go on")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def check_folder(config: Config, runtime: Runtime) -> Iterator[Finding]:
    """Whether every rank can write to the run's folder, and all see the same one. Raises UserError and OSError."""
    folder = _existing(config.folder)

    def begin() -> Path:
        try:
            descriptor, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
        except OSError as error:
            raise UserError(f"{folder} can't be written to ({error.strerror}): choose another run.root") from None
        os.close(descriptor)
        return Path(name)

    shared = runtime.on_main(begin)
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder):
            seen = shared.exists()
    except OSError as error:
        yield Finding("error", "run.root", f"{folder} can't be written to ({error.strerror}); choose another run.root")
    else:
        if seen:
            yield Finding("ok", "run.root", f"{folder} can be written to by all ranks")
        else:
            text = f"{folder} is not the first rank's; choose a run.root on a file system that all nodes share"
            yield Finding("error", "run.root", text)
    finally:
        runtime.any_rank(False)  # all have looked
        if runtime.is_main:
            with contextlib.suppress(OSError):
                shared.unlink()


def check_disk(config: Config, dataset: Dataset | None) -> Iterator[Finding]:
    """Free space against all checkpoints that will be kept, one more while it is written, less what is there."""
    if dataset is None:
        return
    training, run = config.training, config.run
    num_classes = dataset.num_classes if choose(training).classifies else 0
    state = build_state(
        config, dataset.image_shape, num_classes, torch.device("cpu"), torch.amp.GradScaler(enabled=False)
    )
    checkpoint = sum(tensor.nbytes for tensor in state.tensors().values())
    for network, optimizer in (
        (state.generator, training.generator_optimizer),
        (state.critic, training.critic_optimizer),
    ):
        moments = {"rmsprop": 1, "adam": 2}[optimizer.algorithm]
        checkpoint += moments * sum(parameter.nbytes for parameter in network.parameters())
    kept = run.keep_last + (training.steps // math.lcm(run.checkpoint_every, run.keep_every) if run.keep_every else 0)
    count = min(kept, -(-training.steps // run.checkpoint_every)) + 1
    files = [path for folder in committed(config.folder / "checkpoints") for path in folder.iterdir()]
    needed = max(checkpoint, count * checkpoint - sum(path.stat().st_size for path in files))
    folder = _existing(config.folder)
    free = shutil.disk_usage(folder).free
    text = f"{free / MIB:,.1f} MiB free in {folder}, {count} checkpoints need {needed / MIB:,.1f}"
    if free < needed:
        yield Finding("error", "disk", f"{text}; make room, or lower run.keep_last or raise run.keep_every")
    else:
        yield Finding("ok", "disk", text)


def check_time(config: Config, seconds_left: float | None) -> Iterator[Finding]:
    """The job's time limit against the time between two checkpoints, at the pace of the run's newest metrics."""
    if seconds_left is None:
        yield Finding("ok", "time limit", "none is known here")
        return
    usable = seconds_left - SIGNAL_SECONDS
    if usable <= 0:
        text = f"the job has {seconds_left:.0f} s left and keeps {SIGNAL_SECONDS} s to save and stop; raise --time"
        yield Finding("error", "time limit", text)
        return
    step_seconds = _step_seconds(config)
    if step_seconds is None:
        text = f"{usable:.0f} s to train; how long a step takes is not known before the run's first metrics"
        yield Finding("ok", "time limit", text)
        return
    every = config.run.checkpoint_every
    text = f"{usable:.0f} s to train; a checkpoint every {every} steps comes every {every * step_seconds:.0f} s"
    if every * step_seconds > usable:
        fix = f"set run.checkpoint_every to {max(1, int(usable / step_seconds / 4))}, or raise --time"
        yield Finding("warning", "time limit", f"{text}, so the loss of a node would cost the whole job; {fix}")
    else:
        yield Finding("ok", "time limit", text)


def _step_seconds(config: Config) -> float | None:
    try:
        line = json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[-1])
        return float(config.training.n_critic * config.training.batch_size / line["images_per_second"])
    except (OSError, ValueError, IndexError, KeyError):
        return None


if __name__ == "__main__":
    run_program(main)
