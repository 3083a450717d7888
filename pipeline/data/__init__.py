"""The real images: datasets on disk, and the two sources that training reads them through.

Importing this costs no torch: what reads images is imported where it is called.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, DataConfig
from pipeline.data.manifest import FILE_NAME, KINDS, DataError, Dataset, Shard, load_dataset, to_json
from pipeline.data.source import Batch, Source
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.distributed.collectives import Ranks

__all__ = [
    "KINDS",
    "KNOWN",
    "Batch",
    "DataError",
    "Dataset",
    "Shard",
    "Source",
    "check_source",
    "load_dataset",
    "open_dataset",
    "open_source",
    "prepare_known",
    "to_json",
]

KNOWN = {name: f"pipeline.data.prepare:prepare_{name}" for name in ("mnist", "fashion_mnist", "cifar10")}
"""Datasets that are prepared on first use, each with the function that writes it under a root: from the network, or
from a folder that has its files."""


def prepare_known(name: str, root: Path, *arguments: Any) -> Dataset:
    """One of KNOWN as `root`/`name`; `arguments`: a folder with its original files, the sizes of its shards."""
    prepared: Dataset = resolve_name(KNOWN[name])(root, *arguments)
    return prepared


def existing_dataset(config: DataConfig) -> Dataset | None:
    """Reads the manifest of the dataset that the configuration names; None for a known one that is not there yet.

    Raises DataError when another is missing, when it is damaged, or when other images lie in a known one's place.
    """
    if config.dataset not in KNOWN:
        return load_dataset(config.dataset, allow_shell_urls=config.allow_shell_urls)
    folder = Path(config.root) / config.dataset
    if not (folder / FILE_NAME).exists():
        return None
    dataset = load_dataset(folder, allow_shell_urls=config.allow_shell_urls)
    if dataset.kind != config.dataset:
        raise DataError(
            f"{folder} holds images of kind {dataset.kind}, not {config.dataset}: name them by their path "
            f"(data.dataset {folder.absolute()}), or move them away, and {config.dataset} is prepared in their place"
        )
    return dataset


def open_dataset(config: DataConfig) -> Dataset:
    """The dataset that the configuration names; a known one that is not there yet is prepared first.

    Safe in several processes at once: one prepares, the others wait for it. Raises DataError, see `existing_dataset`.
    """
    return existing_dataset(config) or prepare_known(config.dataset, Path(config.root))


def source_kind(config: DataConfig, dataset: Dataset) -> str:
    """resident or streaming: what the configuration asks for, or what its `auto` comes to."""
    if config.source != "auto":
        return config.source
    num_bytes = dataset.num_images("train") * prod(dataset.image_shape)
    return "resident" if num_bytes <= config.resident_limit_mib * 2**20 else "streaming"


def check_source(config: Config, dataset: Dataset | None, world_size: int) -> None:
    """Raises UserError when the batch cannot be shared among the ranks, or streamed among lanes and workers.

    Reads nothing. Without a dataset (one that will be prepared on first use) only the ranks are looked at.
    """
    batch_size, lanes, workers = config.training.batch_size, config.data.lanes, config.data.workers
    if batch_size % world_size:
        raise UserError(
            f"training.batch_size {batch_size} cannot be shared among {world_size} processes: "
            "choose a batch size that the number of processes divides"
        )
    if dataset is None or source_kind(config.data, dataset) == "resident":
        return
    if batch_size % lanes:
        raise UserError(f"data.lanes {lanes} does not divide training.batch_size {batch_size}: choose a divisor of it")
    streams = world_size * max(workers, 1)
    if lanes % streams:
        raise UserError(
            f"data.lanes {lanes} cannot be shared evenly among {world_size} processes with data.workers {workers}: "
            f"choose a multiple of {streams} that divides training.batch_size {batch_size}"
        )
    if (num_images := dataset.num_images("train")) < lanes:
        raise UserError(f"data.lanes {lanes} is more than the {num_images} images of dataset {dataset.name}")


def open_source(config: Config, dataset: Dataset, ranks: Ranks, device: torch.device) -> Source:
    """The train split as the configuration asks for it; `auto` is resident when the decoded split fits its limit.

    This is what training reads: evaluation and pictures have images as they are.

    Raises UserError as `check_source` does, and DataError when a resident split has a damaged shard.
    """
    from pipeline.data.flipping import FlippedSource
    from pipeline.data.resident import ResidentSource
    from pipeline.data.streaming import StreamingSource

    check_source(config, dataset, ranks.world_size)
    lanes, workers = config.data.lanes, config.data.workers
    common: dict[str, Any] = {"batch_size": config.training.batch_size, "seed": config.training.seed, "ranks": ranks}
    source: Source
    if source_kind(config.data, dataset) == "resident":
        source = ResidentSource(dataset, device=device, **common)
    else:
        source = StreamingSource(dataset, lanes=lanes, workers=workers, device=device, **common)
    return FlippedSource(source, **common) if config.data.horizontal_flip else source
