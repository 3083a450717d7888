"""The train split read again in every epoch: the source for what does not fit into memory.

An epoch's order is a permutation of the shards drawn from (seed, epoch), each shuffled inside by (seed, epoch, shard).
Its samples are cut into L consecutive segments whose lengths differ by at most one. Lane l is the endless stream of
segment l of epoch 0, of epoch 1, and so on; global batch k holds samples [k B/L, (k+1) B/L) of every lane, in the order
of the lanes. A rank owns consecutive lanes, hence consecutive rows of the batch (as `Ranks.rows` cuts the latents), and
its workers own consecutive lanes among those. So batches depend neither on the world size nor on the number of workers,
every sample comes once an epoch whatever the sizes of the shards, no rank ever runs dry, and a batch number alone says
where to go on.

A worker is a new interpreter that sends chunks of batches, pickled, through a pipe. So nothing of the rank is in it,
neither a device nor a lock that one of its threads holds, and multiprocessing's start method and the user's script,
which its `spawn` would run again, do not matter. DataLoader would send batches through /dev/shm, which many containers
have too little of, and where 4 MiB cost the training thread 4 ms instead of 1.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import traceback
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from pipeline.data.dataset import Dataset
from pipeline.data.shards import Images, Labels, copy_mirrored, decode, read_shard
from pipeline.data.source import Batch
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.rng import seeded

CHUNK_BATCHES = 64
CHUNK_BYTES = 4 * 2**20
"""Batches travel from a worker, and to the device, in chunks of at most this size: one by one, the hand-over (0.3 ms)
would cost more than the reading."""
WORKER = "import sys; sys.path[:] = sys.argv[1:]; from pipeline.data.streaming import send_chunks; send_chunks()"
BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""Ctrl-C, the launcher and Slurm signal every process, but workers must go on until the rank has saved."""

Chunk = tuple[Images, Labels]
"""uint8 [k, b, C, H, W], mirrored, and int64 [k, b]: k consecutive batches."""


class Piece(NamedTuple):
    """Samples [start, stop) of a shard, in the order that the shard is shuffled into in that epoch."""

    epoch: int
    shard: int
    start: int
    stop: int


class StreamingSource:
    """Batches of shuffled epochs; see the module's docstring.

    It holds about one shard file for each lane, and a few chunks a worker. `check_source` refuses lanes that batch,
    ranks and workers cannot share.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        lanes: int,
        workers: int,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        assert not batch_size % lanes, f"{batch_size} rows among {lanes} lanes"
        # `size` rows of each batch come from one lane. The rank's lanes are those whose rows of the batch it computes.
        owned, size = range(lanes)[ranks.rows(lanes)], batch_size // lanes
        chunk_batches = max(1, min(CHUNK_BATCHES, CHUNK_BYTES // (len(owned) * size * prod(dataset.image_shape))))
        self._lanes = _Lanes(dataset, seed, lanes, size, owned, chunk_batches)
        self._workers, self._device = workers, device

    def batches(self, first: int) -> Iterator[Batch]:
        lanes = replace(self._lanes, first_batch=first)
        chunks = read_in_workers(lanes.shares(self._workers)) if self._workers else zip(lanes)
        for parts in chunks:
            images, labels = (
                torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1))
                for arrays in zip(*parts, strict=True)
            )
            if self._device.type == "cuda":
                # Pinned, the copy does not wait for the device; the allocator keeps the memory until it is done.
                images, labels = images.pin_memory(), labels.pin_memory()
            yield from map(
                Batch, images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
            )

    def damage(self) -> str | None:
        """Returns None: no images are held, shards are read again in each epoch."""
        return None


def pieces(num_images: Sequence[int], seed: int, lanes: int, lane: int, position: int) -> Iterator[Piece]:
    """Yields without end the pieces of shards, of so many images each, that a lane reads from sample `position` of its
    stream on."""
    # Places count the samples of an epoch in its order. This lane's segment of each epoch is [first, last): it has the
    # same length in all of them, so that a division says in which epoch, and where in it, the stream goes on.
    total = sum(num_images)
    first, last = lane * total // lanes, (lane + 1) * total // lanes
    epoch, offset = divmod(position, last - first)
    place = first + offset
    while True:
        order = torch.randperm(len(num_images), generator=seeded(seed, "shard order", epoch)).tolist()
        # Shard order[i] fills the places from ends[i - 1] to ends[i]. The segment's first and last shard may reach into
        # other lanes, which then read them too: with L lanes at most L - 1 shards are read twice in an epoch.
        ends = list(accumulate(num_images[shard] for shard in order))
        index = bisect_right(ends, place)
        while place < last:
            begin = ends[index] - num_images[order[index]]
            stop = min(ends[index], last)
            yield Piece(epoch, order[index], place - begin, stop - begin)
            place = stop
            index += 1
        epoch += 1
        place = first


@dataclass(frozen=True)
class _Lanes:
    """Consecutive lanes, those of a rank or of one of its workers, as chunks of batches without end."""

    dataset: Dataset
    seed: int
    num_lanes: int
    """Of all ranks together."""
    samples_per_batch: int
    """Of one lane."""
    owned: range
    """The lanes that are read here."""
    batches_per_chunk: int
    first_batch: int = 0

    def shares(self, count: int) -> list[_Lanes]:
        """Cuts these lanes into `count` shares of consecutive ones."""
        size = len(self.owned) // count
        return [replace(self, owned=self.owned[index * size : (index + 1) * size]) for index in range(count)]

    def __iter__(self) -> Iterator[Chunk]:
        count, size, shape = self.batches_per_chunk, self.samples_per_batch, self.dataset.image_shape
        # A checksum takes 2 ms per MB, so it is checked only when this process reads a shard for the first time.
        verified: set[int] = set()
        # One lane's part of a chunk. The lanes share this memory, so that it stays in the processor's cache.
        images_of_lane, labels_of_lane = np.empty((count * size, *shape), np.uint8), np.zeros(count * size, np.int64)
        lanes = [self._fill(lane, images_of_lane, labels_of_lane, verified) for lane in self.owned]
        while True:
            images = np.empty((count, len(lanes), size, *shape), np.uint8)
            labels = np.empty((count, len(lanes), size), np.int64)
            for index, lane in enumerate(lanes):
                next(lane)  # fills the shared memory
                copy_mirrored(images_of_lane.reshape(count, size, *shape), images[:, index])
                labels[:, index] = labels_of_lane.reshape(count, size)
            yield images.reshape(count, -1, *shape), labels.reshape(count, -1)

    def _fill(self, lane: int, images: Images, labels: Labels, verified: set[int]) -> Iterator[None]:
        """Fills `images` uint8 [n, C, H, W] and `labels` int64 [n] with the next samples of a lane, again and again.

        `verified` collects the shards whose checksum is known to be right.
        """
        dataset, shards, count = self.dataset, self.dataset.shards("train"), len(images)
        filled, position = 0, self.first_batch * self.samples_per_batch
        for piece in pieces([shard.num_images for shard in shards], self.seed, self.num_lanes, lane, position):
            shard = shards[piece.shard]
            samples = read_shard(dataset, shard, verify=piece.shard not in verified)
            verified.add(piece.shard)
            # The whole shard's permutation: lanes that meet in this shard must cut the same one into disjoint pieces.
            generator = seeded(self.seed, "shard shuffle", piece.epoch, piece.shard)
            rows = torch.randperm(shard.num_images, generator=generator)[piece.start : piece.stop].numpy()
            # A piece may end within a chunk, and a chunk within a piece: each turn copies what both still have.
            while len(rows):
                taken, rows = rows[: count - filled], rows[count - filled :]
                to = slice(filled, filled + len(taken))
                if isinstance(samples.images, np.ndarray):
                    np.take(samples.images, taken, axis=0, out=images[to], mode="clip")  # unlike "raise" without a copy
                else:
                    encoded = [samples.images[row] for row in taken]
                    images[to] = decode(encoded, dataset.image_shape, dataset.locate(shard))
                    del encoded
                if samples.labels is not None:
                    labels[to] = samples.labels[taken]
                filled = to.stop % count
                if not filled:
                    yield
            del samples  # before the next shard is read, so that only one is held


def read_in_workers(shares: Sequence[_Lanes]) -> Iterator[list[Chunk]]:
    """Yields the next chunk of each share; a process reads each. They end with this generator, and with this process.

    Raises UserError: the one that a worker raised, or that one has ended or could not be started.
    """
    with ExitStack() as ending:
        atexit.register(ending.close)  # of a generator that is left to the interpreter's end: modules are gone by then
        ending.callback(atexit.unregister, ending.close)
        workers = []
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # the processes inherit it
        try:
            for _ in shares:
                command = [sys.executable, "-c", WORKER, *sys.path]
                worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                workers.append(ending.enter_context(worker))
                ending.callback(worker.kill)  # it holds nothing that could be damaged
        except OSError as error:
            raise UserError(f"data workers cannot be started ({error}): data.workers 0 reads without any") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for worker, share in zip(workers, shares, strict=True):
            assert worker.stdin is not None
            with suppress(BrokenPipeError), worker.stdin:  # one that has ended already is met below
                pickle.dump(share, worker.stdin)
        while True:
            yield [_receive(worker) for worker in workers]


def _receive(worker: subprocess.Popen[bytes]) -> Chunk:
    assert worker.stdout is not None
    try:
        item: Chunk | UserError = pickle.load(worker.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        raise UserError(
            "a data worker has ended, for lack of memory or for the reason above: data.workers 0 reads without any"
        ) from None
    if isinstance(item, UserError):
        raise item
    return item


def send_chunks() -> NoReturn:
    """Runs in a worker: reads its share of the lanes from standard input, and writes their chunks, or the UserError
    that ends them, to standard output until nobody reads there."""
    try:
        lanes = pickle.load(sys.stdin.buffer)
        output = os.fdopen(os.dup(1), "wb")
        # Commands of shard URLs must neither take from the one nor write into the other.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        try:
            for chunk in lanes:
                pickle.dump(chunk, output, protocol=5)  # which copies no array
                output.flush()
        except UserError as error:
            pickle.dump(error, output)
            output.flush()
    except (BrokenPipeError, EOFError):
        pass  # the rank has ended
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # at once: taking torch apart takes a second
