"""Generated images as pictures for people."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from pipeline.models.networks import Generator
from pipeline.rng import evaluation_labels, evaluation_latents
from pipeline.storage.files import replacing


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> uint8 in [0, 255], rounded; the range is fixed, never the batch's own."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def render(generator: Generator, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    """uint8 images (n, C, H, W) on the CPU of latents (n, latent_dim), by a generator in eval mode."""
    weight = generator.dense.weight
    images = generator(latents.to(weight), None if labels is None else labels.to(weight.device))
    return to_uint8(images).cpu()


def render_range(generator: Generator, seed: int, start: int, stop: int, label: int | None = None) -> Tensor:
    """Evaluation images start, ..., stop - 1 of a seed: uint8 (n, C, H, W). Classes come in turn, or each is `label`.

    Image i of a class is a function of (seed, i).
    """
    latents = evaluation_latents(seed, start, stop, generator.config.latent_dim)
    return render(generator, latents, _labels(generator, start, stop, label))


def sample_grid(generator: Generator, seed: int) -> tuple[Tensor, int]:
    """Images 0, 1, ... of a seed, uint8 (n, C, H, W) row by row, and the number of columns: 16 images, or 10 a class.

    With classes, row c shows images 0 to 9 of class c, for the first 10 classes.
    """
    if not generator.num_classes:
        return render_range(generator, seed, 0, 16), 4
    rows = [render_range(generator, seed, 0, 10, label) for label in range(min(generator.num_classes, 10))]
    return torch.cat(rows), 10


def interpolate(generator: Generator, seed: int, rows: int, columns: int, label: int | None = None) -> Tensor:
    """`rows` straight lines between two latents each: uint8 (rows * columns, C, H, W), row by row.

    Each row has the next class, or all have `label`.
    """
    ends = evaluation_latents(seed, 0, 2 * rows, generator.config.latent_dim).view(2, rows, 1, -1)
    latents = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, columns).view(1, -1, 1)).flatten(0, 1)
    labels = _labels(generator, 0, rows, label)
    return render(generator, latents, None if labels is None else labels.repeat_interleave(columns))


def _labels(generator: Generator, start: int, stop: int, label: int | None) -> Tensor | None:
    if not generator.num_classes:
        return None
    if label is None:
        return evaluation_labels(start, stop, generator.num_classes)
    return torch.full((stop - start,), label)


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 2) -> None:
    """Writes uint8 images (n, C, H, W) as one PNG, atomically, each pixel enlarged `scale` times."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=128).permute(1, 2, 0)
    picture = Image.fromarray(grid.numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
