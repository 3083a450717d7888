"""Streaming: every sample once an epoch, and the same global batches whatever reads them."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset import TarWriter

from pipeline.config import Config, DataConfig, TrainingConfig
from pipeline.data import DataError, Dataset, check_source, load_dataset, open_source, streaming
from pipeline.data.dataset import Shard
from pipeline.data.prepare import index_shards, prepare_npz
from pipeline.data.shards import Samples, read_shard
from pipeline.data.streaming import StreamingSource, pieces
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from tests.data.numbered import image_numbers, numbered_dataset
from tests.data.test_prepare import serving
from tests.jobs import TIMEOUT_SECONDS, environment

COUNTS = [1, 900, 17, 250, 3, 444, 120]
TOTAL = sum(COUNTS)
CPU = torch.device("cpu")


def make_source(
    dataset: Dataset,
    *,
    lanes: int = 4,
    workers: int = 0,
    batch_size: int = 24,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> StreamingSource:
    return StreamingSource(
        dataset,
        lanes=lanes,
        workers=workers,
        batch_size=batch_size,
        seed=seed,
        ranks=Ranks(rank, world_size),
        device=CPU,
    )


def stored_numbers(images: torch.Tensor) -> npt.NDArray[np.int64]:
    """Which samples the images of a batch are, whose sources mirror them."""
    return image_numbers(images.flip(2, 3).numpy())


def numbers(source: StreamingSource, first: int, count: int) -> torch.Tensor:
    """Sample numbers int64 [count, b] of the batches from `first` on; checks that the labels belong to the images."""
    stream = source.batches(first)
    rows = []
    for images, labels in islice(stream, count):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        number = torch.from_numpy(stored_numbers(images))
        assert torch.equal(labels, number % 10)
        rows.append(number)
    stream.close()  # type: ignore[attr-defined]
    return torch.stack(rows)


def all_ranks(dataset: Dataset, world_size: int, first: int, count: int, *, lanes: int, workers: int) -> torch.Tensor:
    """Global batches put together from the slices of every rank."""
    return torch.cat(
        [
            numbers(make_source(dataset, lanes=lanes, workers=workers, rank=rank, world_size=world_size), first, count)
            for rank in range(world_size)
        ],
        dim=1,
    )


@pytest.mark.parametrize("lanes", [1, 4, 8, 12, 24])
def test_every_sample_comes_once_an_epoch(tmp_path: Path, lanes: int) -> None:
    dataset = numbered_dataset(tmp_path, COUNTS)
    epochs = 3
    batches = numbers(make_source(dataset, lanes=lanes), 0, epochs * TOTAL // 24 + 2 * lanes)
    lengths = [(lane + 1) * TOTAL // lanes - lane * TOTAL // lanes for lane in range(lanes)]
    assert max(lengths) - min(lengths) <= 1
    streams = batches.reshape(len(batches), lanes, 24 // lanes).transpose(0, 1).reshape(lanes, -1)
    orders = []
    for epoch in range(epochs):
        seen = [stream[epoch * length : (epoch + 1) * length] for stream, length in zip(streams, lengths, strict=True)]
        epoch_numbers = torch.cat(seen)
        assert torch.equal(epoch_numbers.sort().values, torch.arange(TOTAL))
        orders.append(tuple(epoch_numbers.tolist()))
    assert len(set(orders)) == epochs
    assert tuple(range(TOTAL)) not in orders


@pytest.mark.parametrize(
    ("lanes", "workers"), [(4, 0), (4, 1), (8, 1), (8, 2), (12, 0), (12, 1), (12, 3), (24, 1), (24, 3)]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_in_all_settings(
    tmp_path: Path, lanes: int, workers: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "read_in_workers", lambda shares: zip(*shares, strict=True))  # without processes
    dataset = numbered_dataset(tmp_path, COUNTS)
    count = 2 * TOTAL // 24 + 5
    expected = numbers(make_source(dataset, lanes=lanes), 0, count)
    stop = random.Random(f"{lanes} {workers} {world_size}").randrange(1, count - 1)
    before = all_ranks(dataset, world_size, 0, stop, lanes=lanes, workers=workers)
    after = all_ranks(dataset, world_size, stop, count - stop, lanes=lanes, workers=workers)
    assert torch.equal(torch.cat([before, after]), expected)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    lanes=st.integers(1, 9),
    seed=st.integers(0, 2**63),
    data=st.data(),
)
def test_pieces_are_a_function_of_the_position(counts: list[int], lanes: int, seed: int, data: st.DataObject) -> None:
    total = sum(counts)
    lanes = min(lanes, total)
    epochs = 3

    def walk(lane: int, position: int, length: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for piece in pieces(counts, seed, lanes, lane, position):
            assert 0 <= piece.start < piece.stop <= counts[piece.shard]
            found += [(piece.epoch, piece.shard, at) for at in range(piece.start, piece.stop)]
            if len(found) >= length:
                return found[:length]
        raise AssertionError("a lane ended")

    everything = []
    for lane in range(lanes):
        length = epochs * ((lane + 1) * total // lanes - lane * total // lanes)
        whole = walk(lane, 0, length)
        position = data.draw(st.integers(0, length - 1))
        assert walk(lane, position, length - position) == whole[position:]
        everything += whole
    assert sorted(everything) == [
        (epoch, shard, at) for epoch in range(epochs) for shard, count in enumerate(counts) for at in range(count)
    ]


def test_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, COUNTS)
    first = numbers(make_source(dataset, seed=1), 0, 50)
    assert torch.equal(first, numbers(make_source(dataset, seed=1), 0, 50))
    assert not torch.equal(first, numbers(make_source(dataset, seed=2), 0, 50))
    counts = [10] * 20
    orders = [
        tuple(piece.shard for piece in islice(pieces(counts, seed, 1, 0, 200 * epoch), 20))
        for seed in range(5)
        for epoch in range(5)
    ]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({*orders, tuple(range(20))}) == 26
    # Shards of one size are not shuffled alike.
    pair = numbers(make_source(numbered_dataset(tmp_path, [48, 48], name="pair"), lanes=1), 0, 4).flatten() % 48
    assert not torch.equal(pair[:48], pair[48:])
    # Neighbours in the stream are rarely neighbours in the file.
    lane = numbers(make_source(numbered_dataset(tmp_path, [TOTAL], name="one"), lanes=1), 0, 70).flatten()
    assert (lane.diff().abs() == 1).float().mean() < 0.02


def test_the_global_rngs_are_left_alone(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, COUNTS)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    numbers(make_source(dataset), 3, 5)
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected


def test_a_resumed_lane_reads_from_its_own_shard_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = numbered_dataset(tmp_path, [100] * 40)
    read: list[str] = []
    verified: list[str] = []

    def counting(dataset: Dataset, shard: Shard, *, verify: bool) -> Samples:
        read.append(shard.name)
        verified.extend([shard.name] * verify)
        return read_shard(dataset, shard, verify=verify)

    monkeypatch.setattr(streaming, "read_shard", counting)
    monkeypatch.setattr(streaming, "CHUNK_BATCHES", 1)
    numbers(make_source(dataset, lanes=4, batch_size=40), 1003, 1)
    assert len(read) == 4
    read.clear()
    verified.clear()
    # An epoch is 100 batches of 40: four lanes of ten whole shards each, so every shard is read once.
    numbers(make_source(dataset, lanes=4, batch_size=40), 0, 100)
    names = sorted(shard.name for shard in dataset.shards("train"))
    assert sorted(read) == sorted(verified) == names
    read.clear()
    verified.clear()
    numbers(make_source(dataset, lanes=4, batch_size=40), 0, 200)
    assert sorted(read) == sorted(names * 2)
    assert sorted(verified) == names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lanes": 5}, ["data.lanes 5", "batch_size 24"]),
        ({"lanes": 4, "workers": 3}, ["data.lanes 4", "world size 1,", "data.workers 3", "multiple of 3"]),
        ({"lanes": 4, "world_size": 3}, ["data.lanes 4", "world size 3"]),
        ({"lanes": 12, "world_size": 4, "workers": 2}, ["data.lanes 12", "multiple of 8"]),
    ],
)
def test_lanes_that_cannot_be_shared_are_refused(tmp_path: Path, settings: dict[str, int], words: list[str]) -> None:
    # A manifest is enough to tell: nothing of these 24 MiB exists, and `auto` streams them.
    shard = Shard("train-0.tar", 24, 1, "0" * 64)
    dataset = Dataset(tmp_path, "numbers", (1, 1024, 1024), (), {"train": (shard,)})
    config = Config(
        data=DataConfig(lanes=settings["lanes"], workers=settings.get("workers", 0), resident_limit_mib=1),
        training=TrainingConfig(batch_size=24),
    )
    ranks = Ranks(0, settings.get("world_size", 1))
    refusals = lambda: check_source(config, dataset, ranks.world_size), lambda: open_source(config, dataset, ranks, CPU)
    for refusal in refusals:
        with pytest.raises(UserError) as caught:
            refusal()
        for word in words:
            assert word in str(caught.value)


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped bit":  # of a pixel, which no parser would notice
        with tarfile.open(path) as archive:
            content[archive.getmember("00000100.images.npy").offset_data + 128 + 40] ^= 1
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "replaced":
        path.write_bytes(bytes(len(content)))
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("workers", "kind"),
    [(0, "flipped bit"), (0, "cut"), (0, "replaced"), (0, "deleted"), pytest.param(1, "cut", marks=pytest.mark.slow)],
)
def test_a_damaged_shard_is_named_before_its_images_are_used(tmp_path: Path, workers: int, kind: str) -> None:
    dataset = numbered_dataset(tmp_path, [300] * 6)
    damage(dataset.folder / "train-3.tar", kind)
    source = make_source(dataset, workers=workers)
    seen: list[int] = []
    with pytest.raises(DataError, match=r"train-3\.tar") as caught:
        seen.extend(number for batch in islice(source.batches(0), 200) for number in stored_numbers(batch.images))
    assert "\n" not in str(caught.value)
    assert not set(seen) & set(range(900, 1200))
    assert len(seen) < 1800


def test_single_image_shards_stream(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (37, 3, 5, 3), dtype=np.uint8)
    for shard in range(4):
        with TarWriter(str(tmp_path / f"s{shard}.tar"), encoder=False) as writer:
            for number in range(shard, 37, 4):
                buffer = io.BytesIO()
                Image.fromarray(colours[number]).save(buffer, "PNG")
                writer.write({"__key__": f"{number:03d}", "png": buffer.getvalue(), "cls": str(number).encode()})
    dataset = index_shards(tmp_path / "data", "photos", {"train": [str(tmp_path / "s{0..3}.tar")]})
    assert (dataset.image_shape, dataset.num_classes, dataset.num_images("train")) == ((3, 3, 5), 37, 37)
    stream = make_source(dataset, lanes=1, batch_size=37, seed=4).batches(0)
    for images, labels in islice(stream, 3):
        assert labels.sort().values.tolist() == list(range(37))
        assert np.array_equal(images.flip(2, 3).numpy(), colours[labels.numpy()].transpose(0, 3, 1, 2))


class Once(dict[str, str]):
    """What is wrong with the first answer to each request alone."""

    def get(self, name: str, otherwise: str = "") -> str:  # type: ignore[override]
        return self.pop(name, otherwise)


def test_a_faulty_server_gives_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 503, bodies that end early and ones that never end are asked for again."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("pipeline.data.dataset.TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr("pipeline.data.dataset.time.sleep", lambda seconds: None)
    local = numbered_dataset(tmp_path, COUNTS)
    expected = numbers(make_source(local), 0, TOTAL // 24)
    for mirror in serving(tmp_path):
        remote = load_dataset(f"{mirror.url}numbers")
        faults = ("503", "cut", "stalled", "", "503", "cut", "")
        faulty = Once({f"numbers/train-{number}.tar": fault for number, fault in enumerate(faults)})
        mirror.failing = faulty
        assert torch.equal(numbers(make_source(remote), 0, TOTAL // 24), expected)
        assert not faulty
        for number, fault in enumerate(faults):
            asked = mirror.requests.count(f"numbers/train-{number}.tar")
            assert asked >= 2 if fault else asked, fault


def children() -> list[psutil.Process]:
    """All processes below this one."""
    below = psutil.Process().children(recursive=True)
    return [child for child in below if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_workers_read_the_same_batches_whatever_signals_come_until_the_iterator_ends(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path, COUNTS)
    expected, before = numbers(make_source(dataset, lanes=12), 31, 500), children()
    stream = make_source(dataset, lanes=12, workers=2).batches(31)
    rows = [next(stream)]
    workers = set(children()) - set(before)
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM):
        for worker in workers:
            worker.send_signal(number)
    rows += islice(stream, 499)
    assert np.array_equal(np.stack([stored_numbers(images) for images, _ in rows]), expected.numpy())
    assert all(torch.equal(labels, torch.from_numpy(stored_numbers(images) % 10)) for images, labels in rows)
    assert set(children()) - set(before) == workers
    stream.close()  # type: ignore[attr-defined]
    assert children() == before


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_stream_with_one_line(tmp_path: Path) -> None:
    before = children()
    stream = make_source(numbered_dataset(tmp_path, COUNTS), workers=2).batches(0)
    next(stream)
    (set(children()) - set(before)).pop().kill()
    with pytest.raises(UserError, match=r"^a data worker has ended, for lack of memory or .*: data\.workers 0 reads"):
        list(stream)
    assert children() == before


def test_workers_that_cannot_be_started_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    stream = make_source(numbered_dataset(tmp_path, COUNTS), workers=2).batches(0)
    with pytest.raises(UserError, match=r"^data workers cannot be started \(.*No such file.*\): data\.workers 0 reads"):
        next(stream)


def can_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


BATCHES = """
import sys, torch
from pipeline.data import load_dataset
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.collectives import Ranks
source = StreamingSource(load_dataset(sys.argv[1]), lanes=8, workers=1, batch_size=64, seed=0, ranks=Ranks(),
                         device=torch.device("cpu"))
total = torch.zeros(28, 28, dtype=torch.int64)
for number, batch in zip(range(1, 201), source.batches(0)):
    total += number * batch.images.sum((0, 1))
print(total.tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None or not can_mount(), reason="no mount namespaces here")
def test_workers_need_no_shared_memory(tmp_path: Path) -> None:
    """Containers have a /dev/shm of 64 MB; here it has one, less than one chunk."""
    images = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images)
    dataset = prepare_npz(tmp_path, "noise", {"train": tmp_path / "noise.npz"})
    batches = make_source(dataset, lanes=8, batch_size=64).batches(0)
    expected = torch.zeros(28, 28, dtype=torch.int64)
    for number, batch in zip(range(1, 201), batches, strict=False):
        expected += number * batch.images.sum((0, 1))
    mounted = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", BATCHES, str(dataset.folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment())
    assert (result.stdout, result.stderr) == (f"{expected.tolist()}\n", "")


PROGRAM = """
import multiprocessing, sys, torch
from pipeline.data import load_dataset
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.collectives import Ranks
multiprocessing.set_start_method(sys.argv[3])
source = StreamingSource(load_dataset(sys.argv[1]), lanes=4, workers=1, batch_size=24, seed=0, ranks=Ranks(),
                         device=torch.device("cpu"))
stream = source.batches(0)
next(stream)
print("started", flush=True)
if sys.argv[2] == "raise":
    raise SystemError("lost")
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "start_method"), [("exit", "spawn"), ("raise", "forkserver"), ("wait", "fork")])
def test_no_worker_outlives_its_process(tmp_path: Path, ending: str, start_method: str) -> None:
    """A script without a `__main__` guard, which multiprocessing's `spawn` would run again in each worker."""
    dataset = numbered_dataset(tmp_path, COUNTS)
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(script), str(dataset.folder), ending, start_method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"started\n"
        if ending == "wait":
            assert len(psutil.Process(process.pid).children(recursive=True)) == 1
            process.kill()
        assert process.wait(timeout=60) == {"exit": 0, "raise": 1, "wait": -signal.SIGKILL}[ending]
        errors = process.stderr.read().decode()
    assert errors.endswith("SystemError: lost\n") if ending == "raise" else not errors
    deadline = time.monotonic() + 30
    while group := [each.pid for each in psutil.process_iter() if each.is_running() and in_session(each, process.pid)]:
        assert time.monotonic() < deadline, group
        time.sleep(0.1)


def in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
