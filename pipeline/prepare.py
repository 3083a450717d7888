"""Prepares a dataset: a known one, a folder of images, an .npz file, or existing WebDataset shards."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

from pipeline.data import KINDS, KNOWN, Dataset, prepare_known
from pipeline.data.decoding import add_options
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_npz
from pipeline.distributed.launcher import run_program


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in KNOWN:
        known = commands.add_parser(name, help="fetched and verified")
        known.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="folder with its original files")
    folder = commands.add_parser("folder", help="image files; classes are subfolders")
    npz = commands.add_parser("npz", help="an .npz file with the arrays images and maybe labels")
    shards = commands.add_parser("shards", help="existing WebDataset shards; they stay where they are")
    for option, split in (("train", "training"), ("--test", "test")):
        for command, what in ((folder, "folder"), (npz, "file")):
            command.add_argument(option, type=Path, metavar="PATH", help=f"{what} of the {split} images")
        shards.add_argument(option, nargs="+", metavar="PATTERN", help=f"{split}: folders, files, URLs; *, {{00..12}}")
    shards.add_argument("--allow_shell_urls", action="store_true", help="let URLs run commands (pipe: and the like)")
    for command in (folder, npz, shards):
        command.add_argument("--name", required=True, help="name of the dataset")
        command.add_argument("--kind", choices=KINDS, default="own", help="what the images are (default: own)")
        add_options(command)
    for command in commands.choices.values():
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
        for size, default in ShardSizes()._asdict().items():
            command.add_argument(f"--{size}", type=PositiveInt, default=default, metavar="N")
    return parser.parse_args()


def main() -> None:
    print(prepare(parse()).folder)


def prepare(given: Namespace) -> Dataset:
    root, sizes = given.root, ShardSizes(given.images_per_block, given.images_per_shard)
    if given.command in KNOWN:
        return prepare_known(given.command, root, given.source, sizes)
    Image.MAX_IMAGE_PIXELS = given.max_pixels
    paths = {split: path for split in ("train", "test") if (path := getattr(given, split))}
    own = {"crop": given.crop, "size": given.size, "kind": given.kind}
    if given.command == "shards":
        return index_shards(root, given.name, paths, sizes, allow_shell_urls=given.allow_shell_urls, **own)
    return (prepare_folder if given.command == "folder" else prepare_npz)(root, given.name, paths, sizes, **own)


if __name__ == "__main__":
    run_program(main)
