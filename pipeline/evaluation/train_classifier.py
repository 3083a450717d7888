"""Trains the small classifier of features/classifier.py: to measure what it learns from generated images (GAN-train),
or as a feature space.

`gan-pipeline train-classifier --dataset FOLDER` writes the classifier behind a dataset's `own` features, and made the
one behind `mnist`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torch import Tensor

from pipeline.config import DataConfig, Parser, RuntimeConfig
from pipeline.data import Dataset, open_dataset
from pipeline.data.resident import load_split
from pipeline.data.shards import decode, read_shard
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import choose_device
from pipeline.distributed.progress import bar
from pipeline.errors import UserError
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.features import FORWARD_SIZE, digest_of
from pipeline.evaluation.features.classifier import Classifier, classifier_path, near_chance, training_command
from pipeline.evaluation.interruption import check_interrupted
from pipeline.rng import seeded
from pipeline.storage.files import write_tensors

BATCH_SIZE = 128
LEARNING_RATE = 2e-3
PIXELS_A_SHIFT = 14  # images are shifted by at most one pixel for each 14 of their shorter side: 2 of 28
EPOCHS, LEAST_UPDATES = 10, 2_000
HELD_OUT = 10  # without a test split one in ten training images takes its place
GAN_TRAIN_IMAGES, GAN_TRAIN_EPOCHS = 10_000, 5
RENDERED_TOGETHER = 500

Labelled = tuple[Tensor, Tensor]
"""Images uint8 [n, C, H, W] and classes int64 [n]."""


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image [n, C, H, W] by a random number of pixels along either axis, and fills up with zeros."""
    count, _, height, width = images.shape
    largest = min(height, width) // PIXELS_A_SHIFT
    padded = F.pad(images, (largest,) * 4)
    offsets = torch.randint(2 * largest + 1, (count, 2), generator=generator)
    rows = offsets[:, 0, None, None] + torch.arange(height)[:, None]
    columns = offsets[:, 1, None, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def train(data: Labelled, num_classes: int, *, seed: int, epochs: int, device: torch.device) -> Classifier:
    """Trains a classifier by cross-entropy, with Adam and one cycle of the learning rate."""
    images, labels = data
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # initial weights and dropout
        _, channels, height, width = images.shape
        network = Classifier((channels, height, width), num_classes).to(device)
        network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters())
        batch_size = min(BATCH_SIZE, len(images))
        num_batches = len(images) // batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=epochs * num_batches, pct_start=0.1
        )
        with bar(total=epochs * num_batches, desc="classifier", unit=" updates", leave=False) as progress:
            for epoch in range(epochs):
                order = torch.randperm(len(images), generator=seeded(seed, "classifier order", epoch))
                shifts = seeded(seed, "classifier shifts", epoch)
                for batch in torch.split(order[: num_batches * batch_size], batch_size):
                    check_interrupted()
                    _, logits = network(shifted(images[batch], shifts).to(device))
                    optimizer.zero_grad()
                    torch.autograd.backward(F.cross_entropy(logits, labels[batch].to(device)))
                    optimizer.step()
                    schedule.step()
                    progress.update()
    network.eval()
    return network


@torch.inference_mode()
def accuracy(network: Classifier, data: Labelled, device: torch.device) -> float:
    """Returns the share of images whose class the classifier recognises."""
    images, labels = data
    parts = torch.split(images, FORWARD_SIZE)
    predicted = torch.cat([network(part.to(device))[1].argmax(1).cpu() for part in parts])
    return (predicted == labels).double().mean().item()


def labelled_splits(dataset: Dataset) -> tuple[Labelled, Labelled]:
    """Returns the images to train on and those to test with, decoded."""
    images, labels = load_split(dataset, "train")
    if "test" in dataset.splits:
        return (images, labels), load_split(dataset, "test")
    order = torch.randperm(len(images), generator=seeded(0, "classifier held out"))
    test, train = order.tensor_split([math.ceil(len(images) / HELD_OUT)])
    return (images[train], labels[train]), (images[test], labels[test])


def gan_train(images: ImageSet, dataset: Dataset, seed: int, device: torch.device) -> dict[str, object]:
    """Trains a classifier on the first 10,000 images and the classes that they should show, and tests it on the real
    test split, or on the training split if there is no other: GAN-train (Shmelkov et al. 2018, arXiv 1807.09499,
    section 3).

    An accuracy close to that of a classifier trained on equally many real images means that the generated ones are as
    good and as varied. GAN-test, the reverse, is "class_accuracy" of `class_scores`. Returns "accuracy", how many
    generated "images" were learned from, and how many "real_images" were tested. Raises DataError for a damaged shard.
    """
    assert images.labels is not None
    count = min(images.num_images, GAN_TRAIN_IMAGES)
    starts = range(0, count, RENDERED_TOGETHER)
    rendered = torch.cat([images.render(start, min(start + RENDERED_TOGETHER, count)) for start in starts])
    data = rendered, images.labels[:count]
    network = train(data, dataset.num_classes, seed=seed, epochs=GAN_TRAIN_EPOCHS, device=device)
    split, num_right = "test" if "test" in dataset.splits else "train", 0.0
    for shard in dataset.shards(split):
        check_interrupted()
        samples = read_shard(dataset, shard)
        real = torch.from_numpy(decode(samples.images, dataset.image_shape, dataset.locate(shard)))
        assert samples.labels is not None
        num_right += accuracy(network, (real, torch.from_numpy(samples.labels)), device) * len(real)
    total = dataset.num_images(split)
    return {"accuracy": round(num_right) / total, "images": count, "real_images": total}


def write_classifier(
    dataset: str,
    output: Path | None = None,
    seed: int = 0,
    epochs: PositiveInt | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Trains a classifier of a dataset's classes, whose features `evaluation.features [own]` scores in.

    Takes about five minutes on two cores, for MNIST as for a few hundred images of 32 x 32. Another seed or machine
    gives another feature space: scores compare only within one.

    Args:
        dataset: A known dataset such as cifar10, or the folder of a prepared one with labels.
        output: The .safetensors file to write, by default classifier.safetensors in the dataset's folder.
        seed: The seed of initial weights, dropout, order and shifts.
        epochs: Passes over the training split; by default 10, and more for at least 2,000 updates of a small one.
        device: The device to train on.
    """
    opened = open_dataset(DataConfig(dataset=dataset))
    beside_images = classifier_path(opened)
    path = output or beside_images
    on_cuda, _ = choose_device(RuntimeConfig(device=device), torch.cuda.is_available())
    if path.exists():
        raise UserError(f"{path} is there already: move it away, as scores in its features are no longer comparable")
    place = torch.device("cuda" if on_cuda else "cpu")
    training, testing = labelled_splits(opened)
    epochs = epochs or max(EPOCHS, math.ceil(LEAST_UPDATES / max(1, len(training[0]) // BATCH_SIZE)))
    network = train(training, opened.num_classes, seed=seed, epochs=epochs, device=place)
    result = accuracy(network, testing, place)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {
        "command": f"{training_command(opened)} --seed {seed} --epochs {epochs}",
        "seed": str(seed),
        "dataset": opened.fingerprint,
        "test_accuracy": f"{result:.4f}",
        "test_images": str(len(testing[0])),
        "sha256": digest_of(tensors),
        "torch": torch.__version__,
    }
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    source = "" if "test" in opened.splits else " held out of train"
    print(f"test accuracy {result:.2%} ({len(testing[0])} images{source}): {path}")
    if warning := near_chance(result, opened.num_classes, metadata["command"]):
        print(warning, file=sys.stderr)
    return 0


if __name__ == "__main__":
    name = "gan-pipeline train-classifier"
    run_program(lambda: auto_cli(write_classifier, prog=name, parser_class=Parser, as_positional=False))
