"""Prepares a dataset: MNIST, a folder of images, an .npz file, or existing WebDataset shards."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from pipeline.data.manifest import Dataset
from pipeline.data.prepare import (
    IMAGES_PER_BLOCK,
    IMAGES_PER_SHARD,
    index_shards,
    prepare_folder,
    prepare_mnist,
    prepare_npz,
)
from pipeline.errors import UserError


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(prog="prepare.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    mnist = commands.add_parser("mnist", help="MNIST, fetched and verified")
    mnist.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="folder with the four IDX files")
    folder = commands.add_parser("folder", help="image files; classes are subfolders")
    folder.add_argument("path", type=Path, metavar="PATH")
    folder.add_argument("--test", type=Path, metavar="PATH", help="folder of the test split")
    folder.add_argument("--size", type=_positive, metavar="N", help="crop the centre square and resize it to N x N")
    npz = commands.add_parser("npz", help="an .npz file with the arrays images and maybe labels")
    npz.add_argument("path", type=Path, metavar="PATH")
    npz.add_argument("--test", type=Path, metavar="PATH", help="file of the test split")
    shards = commands.add_parser("shards", help="existing WebDataset shards; they stay where they are")
    shards.add_argument("path", nargs="+", metavar="PATTERN", help="folders, files or URLs, with * and {000..123}")
    shards.add_argument("--test", nargs="+", metavar="PATTERN", help="shards of the test split")
    shards.add_argument("--allow_shell_urls", action="store_true", help="let URLs run commands (pipe: and the like)")

    for command in (folder, npz, shards):
        command.add_argument("--name", required=True, help="name of the dataset")
    for command in (mnist, folder, npz, shards):
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
    for command in (mnist, folder, npz):
        command.add_argument("--images_per_block", type=_positive, default=IMAGES_PER_BLOCK, metavar="N")
        command.add_argument("--images_per_shard", type=_positive, default=IMAGES_PER_SHARD, metavar="N")
    return parser.parse_args(arguments)


def prepare(options: Namespace) -> Dataset:
    if options.command == "shards":
        patterns = {"train": options.path} | ({"test": options.test} if options.test else {})
        return index_shards(options.root, options.name, patterns, allow_shell_urls=options.allow_shell_urls)
    counts = {"images_per_block": options.images_per_block, "images_per_shard": options.images_per_shard}
    if options.command == "mnist":
        return prepare_mnist(options.root, options.source, **counts)
    paths = {"train": options.path} | ({"test": options.test} if options.test else {})
    if options.command == "folder":
        return prepare_folder(options.root, options.name, paths, size=options.size, **counts)
    return prepare_npz(options.root, options.name, paths, **counts)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main() -> None:
    options = parse()
    try:
        dataset = prepare(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(dataset.folder)


if __name__ == "__main__":
    main()
