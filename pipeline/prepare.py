"""Prepares a dataset: MNIST, a folder of images, an .npz file, or existing WebDataset shards."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from jsonargparse.typing import PositiveInt

from pipeline.data.manifest import KINDS, Dataset
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_mnist, prepare_npz
from pipeline.distributed.launcher import run_program


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    mnist = commands.add_parser("mnist", help="MNIST, fetched and verified")
    mnist.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="folder with the four IDX files")
    folder = commands.add_parser("folder", help="image files; classes are subfolders")
    folder.add_argument("--size", type=PositiveInt, metavar="N", help="crop the centre square and resize it to N x N")
    npz = commands.add_parser("npz", help="an .npz file with the arrays images and maybe labels")
    for command, what in ((folder, "folder"), (npz, "file")):
        command.add_argument("train", type=Path, metavar="PATH")
        command.add_argument("--test", type=Path, metavar="PATH", help=f"{what} of the test split")
    shards = commands.add_parser("shards", help="existing WebDataset shards; they stay where they are")
    shards.add_argument("train", nargs="+", metavar="PATTERN", help="folders, files or URLs, with * and {000..123}")
    shards.add_argument("--test", nargs="+", metavar="PATTERN", help="shards of the test split")
    shards.add_argument("--allow_shell_urls", action="store_true", help="let URLs run commands (pipe: and the like)")
    for command in (folder, npz, shards):
        command.add_argument("--name", required=True, help="name of the dataset")
        command.add_argument("--kind", choices=KINDS, default="own", help="what the images are (default: own)")
    for command in (mnist, folder, npz, shards):
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
    for command in (mnist, folder, npz):
        for name, default in ShardSizes()._asdict().items():
            command.add_argument(f"--{name}", type=PositiveInt, default=default, metavar="N")
    return parser.parse_args()


def prepare(given: Namespace) -> Dataset:
    paths = {split: path for split in ("train", "test") if (path := getattr(given, split, None))}
    if given.command == "shards":
        return index_shards(given.root, given.name, paths, allow_shell_urls=given.allow_shell_urls, kind=given.kind)
    sizes = ShardSizes(given.images_per_block, given.images_per_shard)
    if given.command == "mnist":
        return prepare_mnist(given.root, given.source, sizes)
    if given.command == "folder":
        return prepare_folder(given.root, given.name, paths, sizes, size=given.size, kind=given.kind)
    return prepare_npz(given.root, given.name, paths, sizes, kind=given.kind)


def main() -> int:
    print(prepare(parse()).folder)
    return 0


if __name__ == "__main__":
    run_program(main)
