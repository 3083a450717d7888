"""Prepares a dataset: a known one, a folder of images, an .npz file, or existing WebDataset shards."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

from pipeline.data import KINDS, KNOWN, Dataset
from pipeline.data.dataset import LABELS, Reading
from pipeline.data.images import Resizing, add_options
from pipeline.data.prepare import ShardSizes, index_shards, prepare_folder, prepare_known, prepare_npz
from pipeline.distributed.launcher import run_program


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in KNOWN:
        known = commands.add_parser(name, help="fetched and verified")
        known.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="folder with its original files")
    folder = commands.add_parser("folder", help="image files; classes are subfolders")
    npz = commands.add_parser("npz", help="an .npz file: arrays images (or x_train, arr_0) and maybe labels")
    for command in (folder, npz):
        command.add_argument("train", type=Path, metavar="PATH", help="the training images")
        command.add_argument("--test", type=Path, metavar="PATH", help="the test images")
    shards = commands.add_parser("shards", help="existing WebDataset shards; they stay where they are")
    shards.add_argument("train", nargs="+", metavar="PATTERN", help="training: folders, files, URLs; *, {00..12}")
    shards.add_argument("--test", nargs="+", metavar="PATTERN", help="the same for testing")
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
            command.add_argument(f"--{size}", type=PositiveInt, default=default, metavar="N", help="of new shards")
    options = vars(parser.parse_args())
    chosen, root = options.pop("command"), options.pop("root")
    sizes = ShardSizes(options.pop("images_per_block"), options.pop("images_per_shard"))
    if chosen in KNOWN:
        print(prepare_known(chosen, root, options["source"], sizes).folder)
        return
    Image.MAX_IMAGE_PIXELS = options.pop("max_pixels")
    splits = {split: value for split in ("train", "test") if (value := options.pop(split))}
    if chosen == "shards":
        options["resizing"] = Resizing(options.pop("crop"), options.pop("size"))
        options["reading"] = Reading(options.pop("image_key").lower(), options.pop("labels"))
    writers: dict[str, Callable[..., Dataset]]
    writers = {"folder": prepare_folder, "npz": prepare_npz, "shards": index_shards}
    print(writers[chosen](root, options.pop("name"), splits, sizes, **options).folder)


if __name__ == "__main__":
    run_program(main)
