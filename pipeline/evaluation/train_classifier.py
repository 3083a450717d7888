"""The command that makes the classifier behind the `own` features of a dataset, and behind `mnist`:
`python -m pipeline.evaluation.train_classifier --dataset FOLDER`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torch import Tensor

from pipeline.config import DataConfig, RuntimeConfig, check_device
from pipeline.data import Dataset, open_dataset
from pipeline.data.resident import load_split
from pipeline.distributed.launcher import run_program
from pipeline.distributed.progress import bar
from pipeline.errors import UserError
from pipeline.evaluation.features.base import FORWARD_SIZE, digest_of
from pipeline.evaluation.features.classifier import Classifier
from pipeline.evaluation.features.own import classifier_path
from pipeline.evaluation.metrics.states import Poll, never_ends
from pipeline.rng import seeded
from pipeline.storage.files import write_tensors

BATCH_SIZE = 128
LEARNING_RATE = 2e-3
PIXELS_A_SHIFT = 14
"""Images are moved by up to one pixel for each so many of their shorter side: 2 of 28."""
HELD_OUT = 10
"""Where there is no test split, one in so many training images takes its place."""

Labelled = tuple[Tensor, Tensor]
"""uint8 [n, C, H, W] and int64 [n]."""


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image [n, C, H, W] by some pixels in either direction, zeros coming in."""
    count, _, height, width = images.shape
    furthest = min(height, width) // PIXELS_A_SHIFT
    padded = F.pad(images, (furthest,) * 4)
    offsets = torch.randint(2 * furthest + 1, (count, 2), generator=generator)
    rows = offsets[:, 0, None, None] + torch.arange(height)[:, None]
    columns = offsets[:, 1, None, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def train(
    data: Labelled,
    num_classes: int,
    *,
    seed: int,
    epochs: int,
    device: torch.device,
    poll: Poll = never_ends,
) -> Classifier:
    """Cross-entropy and Adam with one cycle of the learning rate. `poll` is called before each batch."""
    images, labels = data
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # initial weights and dropout
        channels, height, width = images.shape[1:]
        network = Classifier((channels, height, width), num_classes).to(device)
        network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters())
        batch_size = min(BATCH_SIZE, len(images))
        num_batches = len(images) // batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=epochs * num_batches, pct_start=0.1
        )
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=seeded(seed, "classifier order", epoch))
            shifts = seeded(seed, "classifier shifts", epoch)
            batches = torch.split(order[: num_batches * batch_size], batch_size)
            for batch in bar(iterable=batches, desc=f"epoch {epoch + 1} of {epochs}", leave=False):
                poll()
                _, logits = network(shifted(images[batch], shifts).to(device))
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(logits, labels[batch].to(device)))
                optimizer.step()
                schedule.step()
    network.eval()
    return network


@torch.inference_mode()
def accuracy(network: Classifier, data: Labelled, device: torch.device) -> float:
    """Share of images that the classifier gets right."""
    images, labels = data
    parts = torch.split(images, FORWARD_SIZE)
    predicted = torch.cat([network(part.to(device))[1].argmax(1).cpu() for part in parts])
    return (predicted == labels).double().mean().item()


def labelled_splits(dataset: Dataset) -> tuple[Labelled, Labelled]:
    """Images to train on and to test with, decoded in memory."""
    images, labels = load_split(dataset, "train")
    if "test" in dataset.splits:
        return (images, labels), load_split(dataset, "test")
    order = torch.randperm(len(images), generator=seeded(0, "classifier held out"))
    count = math.ceil(len(images) / HELD_OUT)
    test, train = order[:count], order[count:]
    return (images[train], labels[train]), (images[test], labels[test])


def write_classifier(
    dataset: str = "mnist",
    output: Path | None = None,
    seed: int = 0,
    epochs: PositiveInt = 10,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Trains a classifier of a dataset's classes, whose features `evaluation.features [own]` scores in.

    Takes about five minutes on two cores for MNIST. Another seed or machine gives another feature space: scores compare
    only within one.

    Args:
        dataset: A known dataset (mnist), or the folder of a prepared one with labels.
        output: The .safetensors file to write, by default classifier.safetensors in the dataset's folder.
        seed: Of the initial weights, dropout, order and shifts.
        epochs: Passes over the training split.
        device: Where it trains.
    """
    known = open_dataset(DataConfig(dataset=dataset))
    path, on = classifier_path(known), RuntimeConfig(device=device)
    path = output or path
    check_device(on, torch.cuda.is_available())
    if path.exists():
        raise UserError(f"{path} is there already: move it away, as scores in its features are no longer comparable")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    training, testing = labelled_splits(known)
    network = train(training, known.num_classes, seed=seed, epochs=epochs, device=place)
    result = accuracy(network, testing, place)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    command = "python -m pipeline.evaluation.train_classifier"
    metadata = {
        "command": f"{command} --dataset {dataset} --seed {seed} --epochs {epochs}",
        "seed": str(seed),
        "dataset": known.fingerprint,
        "test_accuracy": f"{result:.4f}",
        "test_images": str(len(testing[0])),
        "sha256": digest_of(tensors),
        "torch": torch.__version__,
    }
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"test accuracy {result:.2%} ({len(testing[0])} images): {path}")
    return 0


if __name__ == "__main__":
    run_program(lambda: auto_cli(write_classifier))
