"""open_dataset, open_source and the resident source, on the real MNIST."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.config import Config, DataConfig, TrainingConfig
from pipeline.data import Dataset, Source, check_source, open_dataset, open_source
from pipeline.data.resident import ResidentSource, load_split, sum_of
from pipeline.data.streaming import StreamingSource
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.rng import data_indices, horizontal_flips
from tests.data.numbered import numbered_dataset

CPU = torch.device("cpu")


def source_of(
    dataset: Dataset, *, batch_size: int = 64, seed: int = 0, rank: int = 0, world_size: int = 1, **data: object
) -> Source:
    config = Config(
        data=DataConfig(**data),  # type: ignore[arg-type]
        training=TrainingConfig(batch_size=batch_size, seed=seed),
    )
    return open_source(config, dataset, Ranks(rank, world_size), CPU)


def test_mnist_is_what_it_is_known_to_be(mnist_dataset: Dataset) -> None:
    images, labels = load_split(mnist_dataset, "train")
    assert (images.dtype, images.shape) == (torch.uint8, (60_000, 1, 28, 28))
    # The published mean and deviation, and class counts, of the training set.
    pixels = images.double() / 255
    assert round(pixels.mean().item(), 4) == 0.1307
    assert round(pixels.std().item(), 4) == 0.3081
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist_dataset.class_names == tuple("0123456789")
    assert load_split(mnist_dataset, "test")[1].bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


def test_an_opened_dataset_is_the_prepared_one(mnist_dataset: Dataset) -> None:
    config = DataConfig(root=str(mnist_dataset.folder.parent))
    assert open_dataset(config) == mnist_dataset
    assert open_dataset(DataConfig(dataset=str(mnist_dataset.folder))).fingerprint == mnist_dataset.fingerprint


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resident_batches_are_the_drawn_indices(mnist_dataset: Dataset, world_size: int) -> None:
    images, labels = load_split(mnist_dataset, "train")
    sources = [
        source_of(mnist_dataset, seed=3, rank=rank, world_size=world_size, source="resident")
        for rank in range(world_size)
    ]
    for first in (0, 12_345):
        streams = [source.batches(first) for source in sources]
        for number in range(first, first + 3):
            parts = [next(stream) for stream in streams]
            indices = data_indices(3, number, 64, 60_000)
            assert torch.equal(torch.cat([part.images for part in parts]), images[indices].flip(2, 3))
            assert torch.equal(torch.cat([part.labels for part in parts]), labels[indices])


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_a_batch_is_a_function_of_its_number(mnist_dataset: Dataset, kind: str) -> None:
    source = source_of(mnist_dataset, source=kind, workers=0)
    stream = source.batches(0)
    whole = list(islice(stream, 40))
    for first in (0, 1, 17, 39):
        batch = next(source.batches(first))
        assert torch.equal(batch.images, whole[first].images)
        assert torch.equal(batch.labels, whole[first].labels)
    assert whole[0].images.shape == (64, 1, 28, 28)
    assert not torch.equal(whole[0].images, whole[1].images)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_images_are_flipped_left_to_right_by_their_place_in_a_batch(
    mnist_dataset: Dataset, kind: str, world_size: int
) -> None:
    """For any number of ranks, wherever a stream begins; labels stay as they are, and half of the images do."""
    plain = source_of(mnist_dataset, seed=5, source=kind, workers=0)
    sources = [
        source_of(
            mnist_dataset,
            seed=5,
            rank=rank,
            world_size=world_size,
            source=kind,
            workers=0,
            horizontal_flip=True,
        )
        for rank in range(world_size)
    ]
    flipped = 0
    for first in (0, 900):
        streams = [source.batches(first) for source in sources]
        for number, (images, labels) in enumerate(islice(plain.batches(first), 4), first):
            parts = [next(stream) for stream in streams]
            assert torch.equal(torch.cat([part.labels for part in parts]), labels)
            flips = horizontal_flips(5, number, 64, slice(None))
            for seen, image, flip in zip(torch.cat([part.images for part in parts]), images, flips, strict=True):
                assert torch.equal(seen, image[:, :, range(27, -1, -1)] if flip else image)
            flipped += int(flips.sum())
    assert abs(flipped - 256) < 5 * 11.4, "a binomial of 512 at 1/2 has the standard deviation 11.3"


def test_streamed_mnist_is_mnist(mnist_dataset: Dataset) -> None:
    stream = source_of(mnist_dataset, batch_size=96, source="streaming", lanes=8, workers=1).batches(625)
    batches = list(islice(stream, 625))  # the second epoch: 60,000 = 625 x 96, and 8 divides it evenly
    images, labels = load_split(mnist_dataset, "train")
    found = torch.cat([batch.images for batch in batches]).flip(2, 3)
    assert torch.equal(torch.cat([batch.labels for batch in batches]).bincount(), labels.bincount())
    assert sorted(map(bytes, found.numpy())) == sorted(map(bytes, images.numpy()))


def test_auto_chooses_by_decoded_size(tmp_path: Path) -> None:
    small = numbered_dataset(tmp_path, [2**18], name="fits", block=2**18)  # 4 bytes an image: 1 MiB
    large = numbered_dataset(tmp_path, [2**18 + 1], name="not", block=2**19)
    assert isinstance(source_of(small, resident_limit_mib=1), ResidentSource)
    assert isinstance(source_of(large, resident_limit_mib=1), StreamingSource)
    assert isinstance(source_of(large, resident_limit_mib=2), ResidentSource)
    assert isinstance(source_of(small, resident_limit_mib=1, source="streaming"), StreamingSource)
    assert isinstance(source_of(large, resident_limit_mib=1, source="resident"), ResidentSource)


@pytest.mark.parametrize("module", ["pipeline.data", "pipeline.data.dataset"])
def test_a_manifest_is_read_without_torch(module: str) -> None:
    heavy = "{'torch', 'torchvision', 'webdataset', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", f"import sys, {module}; print({heavy})"], capture_output=True)
    assert (result.stdout, result.stderr) == (b"set()\n", b"")


@pytest.mark.slow
def test_sources_import_neither_torchvision_nor_what_trains() -> None:
    """Each data worker imports what streaming needs."""
    modules = "pipeline.data.prepare, pipeline.data.resident, pipeline.data.streaming"
    heavy = "{'torchvision', 'accelerate', 'pipeline.training', 'pipeline.models', 'matplotlib', 'torchmetrics'}"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print({heavy} & set(sys.modules))"], capture_output=True
    )
    assert (result.stdout, result.stderr) == (b"set()\n", b"")


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size 64 .* 3 processes"):
        check_source(Config(), None, 3)
    check_source(Config(), None, 4)
    dataset = numbered_dataset(tmp_path, [100])
    with pytest.raises(UserError, match=r"batch_size 64 .* 3 processes"):
        source_of(dataset, world_size=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_every_flipped_bit_changes_the_sum(dtype: torch.dtype) -> None:
    """Also in the bytes after the last whole 64-bit number."""
    values = torch.randint(100, (3, 1, 3, 3), dtype=dtype, generator=torch.Generator().manual_seed(0))
    before, content = sum_of(values), values.view(-1).view(torch.uint8)
    for position in range(len(content)):
        for bit in range(8):
            content[position] ^= 1 << bit
            assert sum_of(values) != before, (position, bit)
            content[position] ^= 1 << bit
    assert sum_of(values) == before
