"""The train split read through webdataset: the source for what does not fit into memory.

An epoch's order is a permutation of the shards drawn from (seed, epoch), each shuffled inside by (seed, epoch, shard).
Its samples are cut into L consecutive segments whose lengths differ by at most one. Lane l is the endless stream of
segment l of epoch 0, of epoch 1, and so on; global batch k holds samples [k B/L, (k+1) B/L) of every lane, in the order
of the lanes. A rank owns consecutive lanes, hence consecutive rows of the batch (as `sampling.rank_slice` cuts the
latents), and its workers own consecutive lanes among those. So batches depend neither on the world size nor on the
number of workers, every sample comes once an epoch whatever the sizes of the shards, no rank ever runs dry, and a batch
number alone says where to go on.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.manifest import Dataset
from pipeline.data.shards import Images, Labels, decode, read_shard
from pipeline.data.source import Batch
from pipeline.errors import UserError
from pipeline.rng import seeded

CHUNK_BATCHES = 64
CHUNK_BYTES = 4 * 2**20
"""Batches travel from a worker, and to the device, in chunks of at most this size. One by one, the hand-over (0.3 ms)
would cost more than the reading."""


class Piece(NamedTuple):
    """Samples [start, stop) of a shard, in the order that the shard is shuffled into in that epoch."""

    epoch: int
    shard: int
    start: int
    stop: int


class StreamingSource:
    """Batches of shuffled epochs; see the module's docstring.

    Memory: for each lane about one shard file, and a few chunks a worker. Raises UserError when the lanes cannot be
    shared among batch, ranks and workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        lanes: int,
        workers: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        if batch_size % lanes:
            raise UserError(
                f"data.lanes {lanes} does not divide training.batch_size {batch_size}: choose a divisor of it"
            )
        streams = world_size * max(workers, 1)
        if lanes % streams:
            raise UserError(
                f"data.lanes {lanes} cannot be shared evenly among {world_size} processes with data.workers {workers}: "
                f"choose a multiple of {streams} that divides training.batch_size {batch_size}"
            )
        if dataset.num_images("train") < lanes:
            raise UserError(
                f"data.lanes {lanes} is more than the {dataset.num_images('train')} images of dataset {dataset.name}"
            )
        self._dataset, self._seed, self._lanes, self._workers, self._device = dataset, seed, lanes, workers, device
        self._samples_per_lane = batch_size // lanes
        share = lanes // world_size
        self._owned = range(rank * share, (rank + 1) * share)

    def batches(self, first: int) -> Iterator[Batch]:
        chunks = _Chunks(self._dataset, self._seed, self._lanes, self._samples_per_lane, self._owned, first)
        for images, labels in _in_workers(chunks, self._workers) if self._workers else chunks:
            if self._device.type == "cuda":
                # Pinned, the copy does not wait for the device; the allocator keeps the memory until it is done.
                images, labels = images.pin_memory(), labels.pin_memory()
            yield from map(
                Batch, images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
            )


def pieces(num_images: Sequence[int], seed: int, lanes: int, lane: int, position: int) -> Iterator[Piece]:
    """What a lane reads from sample `position` of its stream on, without end; `num_images` counts each shard's."""
    total = sum(num_images)
    first, last = lane * total // lanes, (lane + 1) * total // lanes
    epoch, offset = divmod(position, last - first)
    at = first + offset
    while True:
        order = torch.randperm(len(num_images), generator=seeded(seed, "shard order", epoch)).tolist()
        ends = list(accumulate(num_images[shard] for shard in order))
        index = bisect_right(ends, at)
        while at < last:
            begin = ends[index] - num_images[order[index]]
            stop = min(ends[index], last)
            yield Piece(epoch, order[index], at - begin, stop - begin)
            at = stop
            index += 1
        epoch += 1
        at = first


class _Lane:
    """The samples of one lane, in order."""

    def __init__(self, dataset: Dataset, seed: int, lanes: int, lane: int, position: int, verified: set[int]) -> None:
        self._dataset, self._seed, self._verified = dataset, seed, verified
        counts = [shard.num_images for shard in dataset.shards("train")]
        self._pieces = pieces(counts, seed, lanes, lane, position)
        self._images: Images | list[memoryview] = []
        self._labels: Labels = np.empty(0, np.int64)
        self._location = ""
        self._at = 0

    def fill(self, images: Images, labels: Labels) -> None:
        """Writes the next samples into uint8 [n, C, H, W] and int64 [n]."""
        start = 0
        while start < len(images):
            if self._at == len(self._images):
                self._load(next(self._pieces))
            count = min(len(images) - start, len(self._images) - self._at)
            taken = slice(self._at, self._at + count)
            images[start : start + count] = decode(self._images[taken], self._dataset.image_shape, self._location)
            labels[start : start + count] = self._labels[taken]
            self._at += count
            start += count

    def _load(self, piece: Piece) -> None:
        shard = self._dataset.shards("train")[piece.shard]
        self._images = []  # before the next shard is read, so that only one is held
        samples = read_shard(self._dataset, shard, verify=piece.shard not in self._verified)
        self._verified.add(piece.shard)
        generator = seeded(self._seed, "shard shuffle", piece.epoch, piece.shard)
        rows = torch.randperm(shard.num_images, generator=generator)[piece.start : piece.stop].numpy()
        self._location = self._dataset.locate(shard)
        self._labels = np.zeros(len(rows), np.int64) if samples.labels is None else samples.labels[rows]
        if isinstance(samples.images, np.ndarray):
            self._images = samples.images[rows]
        else:
            self._images = [samples.images[row] for row in rows]
        self._at = 0


class _Chunks(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Chunks of consecutive batches: uint8 [k, b, C, H, W] and int64 [k, b], for the lanes of this worker."""

    def __init__(
        self, dataset: Dataset, seed: int, lanes: int, samples_per_lane: int, owned: range, first: int
    ) -> None:
        self._dataset, self._seed, self._lanes = dataset, seed, lanes
        self._samples_per_lane, self._owned, self._first = samples_per_lane, owned, first
        num_bytes = len(owned) * samples_per_lane * prod(dataset.image_shape)
        self._num_batches = max(1, min(CHUNK_BATCHES, CHUNK_BYTES // num_bytes))  # the same in all workers of a rank

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        owned = self._owned
        if worker := get_worker_info():
            share = len(owned) // worker.num_workers
            owned = owned[worker.id * share : (worker.id + 1) * share]
        verified: set[int] = set()
        position = self._first * self._samples_per_lane
        lanes = [_Lane(self._dataset, self._seed, self._lanes, lane, position, verified) for lane in owned]
        count, size = self._num_batches, self._samples_per_lane
        lane_images = np.empty((count * size, *self._dataset.image_shape), np.uint8)
        lane_labels = np.empty(count * size, np.int64)
        while True:
            images = np.empty((count, len(lanes), size, *self._dataset.image_shape), np.uint8)
            labels = np.empty((count, len(lanes), size), np.int64)
            for index, lane in enumerate(lanes):
                lane.fill(lane_images, lane_labels)
                images[:, index] = lane_images.reshape(count, size, *self._dataset.image_shape)
                labels[:, index] = lane_labels.reshape(count, size)
            yield (
                torch.from_numpy(images.reshape(count, len(lanes) * size, *self._dataset.image_shape)),
                torch.from_numpy(labels.reshape(count, len(lanes) * size)),
            )


class _Reported(IterableDataset[tuple[torch.Tensor, torch.Tensor] | UserError]):
    """A user's error as an item: raised in a worker it would reach the user as a traceback."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor] | UserError]:
        try:
            yield from self._chunks
        except UserError as error:
            yield error


def _in_workers(chunks: _Chunks, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chunks of all workers side by side. The workers end with this generator."""
    loader = DataLoader(
        _Reported(chunks),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else it draws from the global one
        worker_init_fn=_leave_signals_to_parent,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of fork in a process with threads; the workers use none of what such threads hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        iterator = iter(loader)
    try:
        while True:
            parts: list[tuple[torch.Tensor, torch.Tensor]] = []
            for _ in range(workers):  # the loader asks its workers in turn
                item = next(iterator)
                if isinstance(item, UserError):
                    raise item
                parts.append(item)
            images, labels = zip(*parts, strict=True)
            yield torch.cat(images, dim=1), torch.cat(labels, dim=1)
    finally:
        del iterator  # joins the workers


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C, the launcher and Slurm signal every process; the workers must go on until the parent has saved."""
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end_when_parent_says() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_when_parent_says, daemon=True).start()
