"""Draws images from a trained generator: `python pipeline/generate.py -g FILE`."""

import sys
from pathlib import Path
from typing import Literal

from pipeline.config import Parser
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError


def main() -> None:
    parser = Parser(description="Draw images from a trained generator.")
    source = (
        "an export, a Hugging Face folder or hf://OWNER/NAME, a Keras .h5 or .keras, a checkpoint or a run's folder"
    )
    parser.add_argument("-g", "--generator", type=Path, required=True, help=source)
    out_help = "a PNG file (generated.png by default); with --count: a new folder of PNGs (generated)"
    parser.add_argument("--out", type=Path | None, help=out_help)
    parser.add_argument("--count", type=int | None, help="write this many single images instead of a grid")
    label_help = "draw this class alone, by its name or its number from 0 on; image i is the seed's latent i"
    parser.add_argument("--class", type=str, default=None, help=label_help)
    parser.add_argument("--interpolate", action="store_true", help="draw latent interpolations instead of a grid")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights of a checkpoint")
    code = "module:NAME of the code that the generator takes, if it is a network of its user's own"
    parser.add_argument("--network.generator", type=str | None, help=code)
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of the seed and i")
    arguments = parser.parse_args()
    seed, count = arguments.seed, arguments.count
    out: Path = arguments.out or Path("generated" if count else "generated.png")
    if count is not None and (count < 1 or arguments.interpolate):
        raise UserError(f"--count is {count}: give a positive number, and not together with --interpolate")
    if count is None and out.suffix != ".png":
        raise UserError(f"--out is {out}: a picture is written as PNG, name it .png")

    # Imported here, so that `--help` and mistakes need no torch.
    from pipeline.data.class_names import class_asked_for
    from pipeline.export.generator_file import load_generator
    from pipeline.export.images import row_names, save_each, save_picture

    generator = load_generator(arguments.generator, arguments.weights, arguments.network.generator)
    label = None
    if (name := arguments["class"]) is not None:
        label = class_asked_for(name, generator.class_names, generator.num_classes, arguments.generator)
    if out.exists():  # after the other mistakes, which it would hide: the default name often does
        raise UserError(f"{out}: exists already, choose another --out")
    if count is not None:
        save_each(generator, seed, count, out, label)
    else:
        save_picture(generator, out, seed, label, is_strip=arguments.interpolate)
        if label is None and not arguments.interpolate and (names := row_names(generator)):
            print(f"rows, from the top: {', '.join(map(repr, names))}", file=sys.stderr)
    print(out)


if __name__ == "__main__":
    run_program(main)
