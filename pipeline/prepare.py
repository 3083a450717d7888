"""Prepares a dataset: MNIST, a folder of images, an .npz file, or existing WebDataset shards."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from jsonargparse.typing import PositiveInt

from pipeline.data import Dataset
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_mnist, prepare_npz
from pipeline.distributed.launcher import run_program


def parse() -> Namespace:
    parser = ArgumentParser(prog="prepare.py", description=__doc__)
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
    for command in (mnist, folder, npz, shards):
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
    for command in (mnist, folder, npz):
        for name, default in ShardSizes()._asdict().items():
            command.add_argument(f"--{name}", type=PositiveInt, default=default, metavar="N")
    return parser.parse_args()


def prepare(options: Namespace) -> Dataset:
    given = vars(options)
    paths = {split: given[split] for split in ("train", "test") if given.get(split)}
    if options.command == "shards":
        return index_shards(options.root, options.name, paths, allow_shell_urls=options.allow_shell_urls)
    sizes = ShardSizes(options.images_per_block, options.images_per_shard)
    if options.command == "mnist":
        return prepare_mnist(options.root, options.source, sizes)
    if options.command == "folder":
        return prepare_folder(options.root, options.name, paths, sizes, size=options.size)
    return prepare_npz(options.root, options.name, paths, sizes)


def main() -> int:
    print(prepare(parse()).folder)
    return 0


if __name__ == "__main__":
    run_program(main)
