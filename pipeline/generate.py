"""Draws images from a trained generator: `python pipeline/generate.py -g FILE`."""

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from PIL import Image

from pipeline.errors import UserError
from pipeline.export import load_generator
from pipeline.pictures import interpolate, render_range, sample_grid, save_grid
from pipeline.progress import bar
from pipeline.distributed.process import run_entry

BATCH = 500


def main() -> int:
    parser = ArgumentParser(description="Draw images from a trained generator.")
    parser.add_argument(
        "-g",
        "--generator",
        type=Path,
        required=True,
        help="an export, a Keras notebook's .h5, a checkpoint or a run's folder",
    )
    parser.add_argument("--out", type=Path | None, help="grid or strip: a PNG file; with --count: a new folder of PNGs")
    parser.add_argument("--count", type=int | None, help="write this many single images instead of a grid")
    parser.add_argument("--class", type=int | None, help="draw this class alone; image i is the seed's latent i")
    parser.add_argument("--interpolate", action="store_true", help="draw latent interpolations instead of a grid")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights of a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of the seed and i")
    arguments = parser.parse_args()
    out: Path = arguments.out or Path("generated" if arguments.count else "generated.png")
    if arguments.count is not None and (arguments.count < 1 or arguments.interpolate):
        raise UserError(f"--count is {arguments.count}: give a positive number, and not together with --interpolate")
    if out.exists():
        raise UserError(f"{out}: exists already, choose another --out")
    generator = load_generator(arguments.generator, arguments.weights)
    label: int | None = arguments["class"]
    if label is not None and not generator.num_classes:
        raise UserError(f"--class is {label}: {arguments.generator} has no classes, leave it away")
    if label is not None and not 0 <= label < generator.num_classes:
        raise UserError(f"--class is {label}: {arguments.generator} has the classes 0 to {generator.num_classes - 1}")
    if arguments.count is None:
        if arguments.interpolate:
            save_grid(interpolate(generator, arguments.seed, 8, 10, label), out, columns=10)
        elif label is None:
            images, columns = sample_grid(generator, arguments.seed)
            save_grid(images, out, columns)
        else:
            save_grid(render_range(generator, arguments.seed, 0, 16, label), out, columns=4)
    else:
        out.mkdir(parents=True)
        for start in bar(iterable=range(0, arguments.count, BATCH), unit=f"{BATCH} images"):
            images = render_range(generator, arguments.seed, start, min(start + BATCH, arguments.count), label)
            for index, image in enumerate(images.permute(0, 2, 3, 1).squeeze(-1).numpy(), start):
                Image.fromarray(image).save(out / f"{index:06d}.png")
    print(out)
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_entry(main)
