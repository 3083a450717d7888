"""Prepares a dataset: a known one, a folder of images, an .npz file, or existing WebDataset shards."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

from pipeline.data import KINDS, KNOWN, Dataset
from pipeline.data.dataset import LABELS, Reading
from pipeline.data.images import Resizing, add_options
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_known, prepare_npz
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
    shards.add_argument("--image-key", default="", metavar="KEY", help="image of a sample: png, seg.png, 'jpg;png'")
    shards.add_argument("--labels", choices=LABELS, default="members", help="members: .cls or .json (the default)")
    shards.add_argument("--allow_shell_urls", action="store_true", help="let URLs run commands (pipe: and the like)")
    for command in (folder, npz, shards):
        command.add_argument("--name", required=True, help="name of the dataset")
        command.add_argument("--kind", choices=KINDS, default="own", help="what the images are (default: own)")
        add_options(command)
    for command in commands.choices.values():
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
        for size, default in ShardSizes()._asdict().items():
            text = f"{'with --crop or --size: ' if command is shards else ''}(default: {default})"
            command.add_argument(f"--{size}", type=PositiveInt, default=default, metavar="N", help=text)
    return parser.parse_args()


def main() -> None:
    print(prepare(parse()).folder)


def prepare(arguments: Namespace) -> Dataset:
    sizes = ShardSizes(arguments.images_per_block, arguments.images_per_shard)
    if arguments.command in KNOWN:
        return prepare_known(arguments.command, arguments.root, arguments.source, sizes)
    Image.MAX_IMAGE_PIXELS = arguments.max_pixels
    paths = {split: path for split in ("train", "test") if (path := getattr(arguments, split))}
    place, resizing = (arguments.root, arguments.name, paths, sizes), Resizing(arguments.crop, arguments.size)
    if arguments.command == "shards":
        reading, allowed = Reading(arguments.image_key.lower(), arguments.labels), arguments.allow_shell_urls
        return index_shards(*place, resizing=resizing, kind=arguments.kind, reading=reading, allow_shell_urls=allowed)
    write = prepare_folder if arguments.command == "folder" else prepare_npz
    return write(*place, **resizing._asdict(), kind=arguments.kind)


if __name__ == "__main__":
    run_program(main)
