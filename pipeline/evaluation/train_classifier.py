"""The command that makes the `mnist` features: `python -m pipeline.evaluation.train_classifier [--seed N] ...`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.config import DataConfig
from pipeline.data import open_dataset
from pipeline.data.resident import load_split
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.evaluation.features.mnist import MNIST_SHAPE, MNIST_WEIGHTS, MnistClassifier
from pipeline.rng import seeded

EPOCHS = 10
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
MAX_SHIFT = 2


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image [n, 1, H, W] by up to MAX_SHIFT pixels in either direction, zeros coming in."""
    count, _, height, width = images.shape
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (count, 2), generator=generator)
    rows = offsets[:, 0, None, None] + torch.arange(height)[:, None]
    columns = offsets[:, 1, None, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)


def train(images: Tensor, labels: Tensor, seed: int) -> MnistClassifier:
    """Cross-entropy and Adam with one cycle of the learning rate, on uint8 [n, 1, 28, 28] and int64 [n]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        network = MnistClassifier().to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters())
        num_batches = len(images) // BATCH_SIZE
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=EPOCHS * num_batches, pct_start=0.1
        )
        for epoch in range(EPOCHS):
            order = torch.randperm(len(images), generator=seeded(seed, "classifier order", epoch))
            shifts = seeded(seed, "classifier shifts", epoch)
            batches = torch.split(order[: num_batches * BATCH_SIZE], BATCH_SIZE)
            for batch in tqdm(batches, desc=f"epoch {epoch + 1} of {EPOCHS}", leave=False):
                _, logits = network(shifted(images[batch], shifts))
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(logits, labels[batch]))
                optimizer.step()
                schedule.step()
    return network.eval()


@torch.inference_mode()
def accuracy(network: MnistClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 [n, 1, 28, 28] that the classifier gets right."""
    predicted = torch.cat([network(part)[1] for part in torch.split(images, 100)]).argmax(1)
    return (predicted == labels).double().mean().item()


def write_classifier(dataset: str = "mnist", output: Path = MNIST_WEIGHTS, seed: int = 0) -> int:
    """Trains the digit classifier behind the `mnist` features and writes its weights into the package.

    Takes about five minutes on two cores. Another seed gives another feature space: scores compare only within one.

    Args:
        dataset: mnist, or the folder of a prepared copy of it.
        output: The .safetensors file to write, by default the package's own.
        seed: Of the initial weights, dropout, order and shifts.
    """
    digits = open_dataset(DataConfig(dataset=dataset))
    if digits.image_shape != MNIST_SHAPE or digits.num_classes != MnistClassifier.num_classes:
        raise UserError(f"--dataset {dataset} holds no digits of shape {MNIST_SHAPE} in ten classes")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist")
    test_images, test_labels = load_split(digits, "test")
    network = train(*load_split(digits, "train"), seed)
    result = accuracy(network, test_images, test_labels)
    metadata = {
        "command": f"python -m pipeline.evaluation.train_classifier --seed {seed}",
        "seed": str(seed),
        "dataset": digits.fingerprint,
        "test_accuracy": f"{result:.4f}",
        "torch": torch.__version__,
    }
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, output, metadata)
    output.chmod(0o644)  # safetensors makes it readable by its owner alone
    print(f"test accuracy {result:.2%}: {output}")
    return 0


if __name__ == "__main__":
    run_program(lambda: auto_cli(write_classifier))
