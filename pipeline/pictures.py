"""Generated images as pictures for people."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from pipeline.files import replacing
from pipeline.networks import Generator
from pipeline.sampling import evaluation_labels, evaluation_latents


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> uint8 in [0, 255], rounded; the range is fixed, never the batch's own."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def render(generator: Generator, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    """uint8 images (n, C, H, W) on the CPU of latents (n, latent_dim), by a generator in eval mode."""
    weight = generator.dense.weight
    images = generator(latents.to(weight), None if labels is None else labels.to(weight.device))
    return to_uint8(images).cpu()


def render_range(generator: Generator, seed: int, start: int, stop: int) -> Tensor:
    """Evaluation images start, ..., stop - 1 of a seed: uint8 (n, C, H, W). Classes come in turn."""
    labels = evaluation_labels(start, stop, generator.num_classes) if generator.num_classes else None
    return render(generator, evaluation_latents(seed, start, stop, generator.config.latent_dim), labels)


def interpolate(generator: Generator, seed: int, rows: int, columns: int) -> Tensor:
    """`rows` straight lines between two latents each: uint8 (rows * columns, C, H, W), row by row."""
    ends = evaluation_latents(seed, 0, 2 * rows, generator.config.latent_dim).view(2, rows, 1, -1)
    latents = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, columns).view(1, -1, 1)).flatten(0, 1)
    labels = (
        evaluation_labels(0, rows, generator.num_classes).repeat_interleave(columns) if generator.num_classes else None
    )
    return render(generator, latents, labels)


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 2) -> None:
    """Writes uint8 images (n, C, H, W) as one PNG, atomically, each pixel enlarged `scale` times."""
    grid = make_grid(images, nrow=columns, padding=2, pad_value=128).permute(1, 2, 0)
    picture = Image.fromarray(grid.numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
