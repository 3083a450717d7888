"""Prepares a dataset: a known one, a folder of images, an .npz file, or existing WebDataset shards."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

from pipeline.data import KINDS, KNOWN, Dataset, prepare_known
from pipeline.data.decoding import add_options
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_npz
from pipeline.data.prepare.sources import add_shard_options, shard_options
from pipeline.distributed.launcher import run_program


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in KNOWN:
        known = commands.add_parser(name, help="fetched and verified")
        known.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="folder with its original files")
    folder = commands.add_parser("folder", help="image files; classes are subfolders")
    npz = commands.add_parser("npz", help="an .npz file: arrays images (or x_train, arr_0) and maybe labels")
    shards = commands.add_parser("shards", help="existing WebDataset shards; they stay where they are")
    for option, split in (("train", "training"), ("--test", "test")):
        for command in (folder, npz):
            command.add_argument(option, type=Path, metavar="PATH", help=f"the {split} images")
        shards.add_argument(option, nargs="+", metavar="PATTERN", help=f"{split}: folders, files, URLs; *, {{00..12}}")
    add_shard_options(shards)
    for command in (folder, npz, shards):
        command.add_argument("--name", required=True, help="name of the dataset")
        command.add_argument("--kind", choices=KINDS, default="own", help="what the images are (default: own)")
        add_options(command)
    shards.set_defaults(**ShardSizes()._asdict())
    for name, command in commands.choices.items():
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
        for size, default in ShardSizes()._asdict().items() if name != "shards" else ():
            command.add_argument(f"--{size}", type=PositiveInt, default=default, metavar="N")
    return parser.parse_args()


def main() -> None:
    print(prepare(parse()).folder)


def prepare(given: Namespace) -> Dataset:
    sizes = ShardSizes(given.images_per_block, given.images_per_shard)
    if given.command in KNOWN:
        return prepare_known(given.command, given.root, given.source, sizes)
    Image.MAX_IMAGE_PIXELS = given.max_pixels
    paths = {split: path for split in ("train", "test") if (path := getattr(given, split))}
    place, own = (given.root, given.name, paths), {name: vars(given)[name] for name in ("crop", "size", "kind")}
    if given.command == "shards":
        return index_shards(*place, **(own | shard_options(given)))
    return (prepare_folder if given.command == "folder" else prepare_npz)(*place, sizes, **own)


if __name__ == "__main__":
    run_program(main)
