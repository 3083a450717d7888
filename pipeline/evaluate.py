"""Scores images: `accelerate launch pipeline/evaluate.py TARGET [--step N | --all]`."""

import sys
from pathlib import Path

from PIL import Image

from pipeline import evaluate
from pipeline.config import make_parser, parse
from pipeline.data import KINDS
from pipeline.data.images import add_options
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.evaluation import TARGET
from pipeline.storage.run_folder import RunFolder

FIRST = ("data.dataset", "evaluation.num_images", "evaluation.features", "evaluation.weights", "runtime.device")
"""The settings that matter most here."""


def main() -> None:
    parser = make_parser("Score images: a run's with its own settings, changed by those given here.", FIRST)
    parser.add_argument("target", type=Path, help=TARGET)
    parser.add_argument(
        "real", type=Path | None, nargs="?", help="a folder or .npz file to compare with, not a dataset"
    )
    parser.add_argument("--kind", choices=KINDS, default="own", help="what the real images are")
    parser.add_argument("--step", type=int | None, help="the checkpoint to score; the newest intact one by default")
    parser.add_argument("--all", action="store_true", help="score every checkpoint of the run")
    parser.add_argument("--out", type=Path | None, help="file of the scores (by default in the run, or under run.root)")
    add_options(parser)
    config, arguments = parse(parser)
    run = RunFolder(arguments.target)
    if run.config.is_file():
        config, arguments = parse(parser, ["--config", str(run.config), *sys.argv[1:]])
    if arguments.all and (arguments.out or arguments.real or arguments.step is not None):
        raise UserError("--all scores every checkpoint into the run: leave out --step, --out and what to compare with")
    Image.MAX_IMAGE_PIXELS = arguments.max_pixels
    options = {name: arguments[name] for name in ("real", "kind", "out", "crop", "size")}
    options["steps"] = "all" if arguments.all else "newest" if arguments.step is None else [arguments.step]
    evaluate(run.path, config, **options)


if __name__ == "__main__":
    run_program(main)
