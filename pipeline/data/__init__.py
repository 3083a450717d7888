"""The real images: datasets on disk, and the two sources that training reads them through."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from pipeline.config import DataConfig
from pipeline.data.manifest import FILE_NAME, DataError, Dataset, Shard, load_dataset
from pipeline.data.prepare import prepare_mnist
from pipeline.data.resident import ResidentSource
from pipeline.data.source import Batch, Source
from pipeline.data.streaming import StreamingSource

__all__ = ["Batch", "DataError", "Dataset", "Shard", "Source", "load_dataset", "open_dataset", "open_source"]

KNOWN = {"mnist": prepare_mnist}
"""Datasets that are prepared on first use under data.root."""


def open_dataset(config: DataConfig) -> Dataset:
    """The dataset that the configuration names; a known one that is not there yet is prepared first.

    Safe in several processes at once: one prepares, the others wait for it. Raises DataError.
    """
    folder = dataset_folder(config)
    if config.dataset in KNOWN and not (Path(folder) / FILE_NAME).exists():
        KNOWN[config.dataset](Path(config.root))
    return load_dataset(folder, allow_shell_urls=config.allow_shell_urls)


def source_kind(config: DataConfig, dataset: Dataset) -> str:
    """resident or streaming: what the configuration asks for, or what its `auto` comes to."""
    if config.source != "auto":
        return config.source
    num_bytes = dataset.num_images("train") * prod(dataset.image_shape)
    return "resident" if num_bytes <= config.resident_limit_mib * 2**20 else "streaming"


def dataset_folder(config: DataConfig) -> str | Path:
    """The folder or URL of the dataset that the configuration names, whether it is there or not."""
    return Path(config.root) / config.dataset if config.dataset in KNOWN else config.dataset


def open_source(
    config: DataConfig,
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Source:
    """The train split as the configuration asks for it; `auto` is resident when the decoded split fits its limit.

    Raises UserError when the batch cannot be shared among the ranks, lanes or workers.
    """
    if source_kind(config, dataset) == "resident":
        return ResidentSource(
            dataset, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, device=device
        )
    return StreamingSource(
        dataset,
        lanes=config.lanes,
        workers=config.workers,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
    )
