"""Images of a generator for people: uint8, the right way round, alone or in a grid, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.distributed.progress import bar
from pipeline.errors import UserError
from pipeline.models.networks import AnyGenerator
from pipeline.rng import evaluation_labels, evaluation_latents
from pipeline.storage.files import new_folder, replacing
from pipeline.storage.run_folder import RunFolder

BATCH = 500
BORDER, GREY = 2, 128
MOST_ROWS = 10
"""The number of classes that a grid shows at most."""


@torch.no_grad()
def render(generator: AnyGenerator, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    """Returns the images of latents (n, latent_dim), uint8 (n, C, H, W) on the CPU, by a generator in eval mode.

    This is the only place where the generator's mirrored images are flipped back, and their pixels in [0, 1] become
    bytes: the range does not depend on the batch.
    """
    weight = next(generator.parameters())
    mirrored: Tensor = generator(latents.to(weight), None if labels is None else labels.to(weight.device))
    return (mirrored * 255).round().clamp(0, 255).to(torch.uint8).flip(2, 3).cpu()


def render_range(
    generator: AnyGenerator,
    seed: int,
    start: int,
    stop: int,
    label: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Returns images number start, ..., stop - 1 of a seed, uint8 (n, C, H, W). Image i is a function of (seed, i, its
    class). The classes take turns, or have the shares of `sizes` (see `evaluation_labels`), or all are `label`. Raises
    UserError if there is no such class."""
    latents = evaluation_latents(seed, start, stop, generator.config.latent_dim)
    return render(generator, latents, _labels(generator, start, stop, label, sizes))


def sample_grid(generator: AnyGenerator, seed: int, label: int | None = None) -> tuple[Tensor, int]:
    """Returns the first images of a seed, uint8 (n, C, H, W) row by row, and the number of columns.

    With classes and no `label`, row c has images 0 to 9 of class c, for the first 10 classes (see `row_names`).
    Otherwise there are 16 images in 4 columns.
    """
    if label is not None or not generator.num_classes:
        return render_range(generator, seed, 0, 16, label), 4
    rows = [render_range(generator, seed, 0, 10, row) for row in range(min(generator.num_classes, MOST_ROWS))]
    return torch.cat(rows), 10


def row_names(generator: AnyGenerator) -> tuple[str, ...]:
    """Returns the names of the classes in the rows of `sample_grid`, from the top; none if they are not known."""
    return generator.class_names[:MOST_ROWS]


def interpolate(generator: AnyGenerator, seed: int, rows: int, columns: int, label: int | None = None) -> Tensor:
    """Returns images along straight lines between two latents, uint8 (rows * columns, C, H, W), a line in each row.
    Each row has the next class, or all have `label`."""
    ends = evaluation_latents(seed, 0, 2 * rows, generator.config.latent_dim).view(2, rows, 1, -1)
    latents = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, columns).view(1, -1, 1)).flatten(0, 1)
    return render(generator, latents, _labels(generator, 0, rows, label).repeat_interleave(columns))


def _labels(
    generator: AnyGenerator, start: int, stop: int, label: int | None, sizes: Sequence[int] | None = None
) -> Tensor:
    if label is not None and not 0 <= label < generator.num_classes:
        last = generator.num_classes - 1
        raise UserError(f"label is {label}: {f'the classes are 0 to {last}' if last > 0 else 'there are no classes'}")
    if label is None:
        in_turn = [1] * (generator.num_classes or 1)  # without classes nothing reads them
        return evaluation_labels(start, stop, sizes or in_turn)
    return torch.full((stop - start,), label)


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 2) -> None:
    """Writes uint8 images (n, C, H, W) as one PNG, atomically, each pixel enlarged `scale` times. Between images are
    grey lines of two pixels, and grey fills the rest of the last row."""
    columns = min(columns, len(images))
    missing = -len(images) % columns
    cells = F.pad(images, (BORDER, 0, BORDER, 0, 0, 0, 0, missing), value=GREY)
    rows = cells.view(-1, columns, *cells.shape[1:]).permute(2, 0, 3, 1, 4)  # (C, rows, H, columns, W)
    grid = F.pad(rows.flatten(3).flatten(1, 2), (0, BORDER, 0, BORDER), value=GREY)
    pixels = grid.expand(3 if len(grid) == 1 else -1, -1, -1).permute(1, 2, 0)
    picture = Image.fromarray(pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_picture(
    generator: AnyGenerator, path: Path, seed: int = 0, label: int | None = None, *, is_strip: bool = False
) -> None:
    """Writes `sample_grid`, or else 8 lines of `interpolate` with 10 images each, as one PNG."""
    if is_strip:
        save_grid(interpolate(generator, seed, 8, 10, label), path, columns=10)
    else:
        images, columns = sample_grid(generator, seed, label)
        save_grid(images, path, columns)


def save_animation(run: Path, path: Path) -> None:
    """Writes the grids of samples of a run's folder as an animation, atomically: lossless WebP, or else an animated PNG
    by another suffix. Each stays for 200 ms, the last one for two seconds.

    Raises:
        UserError: There are none.
    """
    grids = RunFolder(run).grids()
    if not grids:
        raise UserError(f"{run}: holds no samples, of which an animation is made: give a run's folder")
    first, *others = (Image.open(grid).convert("RGB") for _, grid in grids)
    times = [200] * len(others) + [2000]
    kind = "WEBP" if path.suffix == ".webp" else "PNG"
    with replacing(path) as temporary:
        first.save(temporary, kind, save_all=True, append_images=others, duration=times, loop=0, lossless=True)


def save_each(generator: AnyGenerator, seed: int, count: int, folder: Path, label: int | None = None) -> None:
    """Writes images 0, ..., count - 1 of `render_range` as 000000.png, ... in a new folder, which gets its name when
    all are there: an interrupt leaves nothing."""
    with new_folder(folder) as new:
        for start in bar(iterable=range(0, count, BATCH), unit=f"{BATCH} images"):
            images = render_range(generator, seed, start, min(start + BATCH, count), label)
            for index, image in enumerate(images.permute(0, 2, 3, 1).squeeze(-1).numpy(), start):
                Image.fromarray(image).save(new / f"{index:06d}.png")
