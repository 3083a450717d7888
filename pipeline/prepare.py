"""Prepares a dataset: a known one, image files, arrays, tables, the Hugging Face Hub's, or WebDataset shards."""

from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

from pipeline.config.messages import PlainParser
from pipeline.data import KINDS, KNOWN, prepare
from pipeline.data.dataset import LABELS, Reading
from pipeline.data.images import Resizing, add_options
from pipeline.distributed.launcher import run_program


def main() -> None:
    parser = PlainParser(description=__doc__)
    commands = parser.add_subparsers(dest="source", required=True)
    for name in KNOWN:
        prepare.known.add_options(commands.add_parser(name, help="a known dataset, fetched and verified"), name)
    for name, (_, metavar, what) in prepare.SOURCES.items():
        add = commands.add_parser(name, help=what).add_argument
        several = "+" if metavar == "PATTERN" else None
        if name == "hf":
            add("origin", nargs="+", metavar="NAME", help="OWNER/NAME, or a folder; and the subset, if it has several")
        train, text = (("--train", "--split"), "split of the training images") if name == "hf" else (("train",), what)
        add(*train, nargs=several, metavar=metavar, default="train", help=text)
        add("--test", nargs=several, metavar=metavar, help="the test images")
        for column in ("image", "label") if name in ("hf", "parquet") else ():
            add(f"--{column}", default=column, metavar="COLUMN", help=f"where the {column}s are (default: {column})")
        if name == "shards":
            add("--image-key", default="", metavar="KEY", help="image of a sample: png, seg.png, 'jpg;png'")
            add("--labels", choices=LABELS, default="members", help="members: .cls or .json (the default)")
            add("--allow_shell_urls", action="store_true", help="let URLs run commands (pipe: and the like)")
        add("--name", required=True, help="name of the dataset")
        add("--kind", choices=KINDS, default="own", help="what the images are (default: own)")
        add_options(commands.choices[name])
    for command in commands.choices.values():
        command.add_argument("--root", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
        for size, default in prepare.ShardSizes()._asdict().items():
            command.add_argument(f"--{size}", type=PositiveInt, default=default, metavar="N", help="in shards to write")
    options = vars(parser.parse_args())
    source, root = options.pop("source"), options.pop("root")
    sizes = prepare.ShardSizes(options.pop("images_per_block"), options.pop("images_per_shard"))
    if source in KNOWN:
        prepare.finish(prepare.prepare_known(source, root, options.pop("origin"), sizes, **options))
        return
    Image.MAX_IMAGE_PIXELS = options.pop("max_pixels")
    splits = {split: value for split in ("train", "test") if (value := options.pop(split))}
    if source in ("hf", "parquet", "shards"):
        options["resizing"] = Resizing(options.pop("crop"), options.pop("size"))
    if source in ("hf", "parquet"):
        options["columns"] = options.pop("image"), options.pop("label")
    if source == "shards":
        options["reading"] = Reading(options.pop("image_key").lower(), options.pop("labels"))
    prepare.finish(prepare.SOURCES[source][0](root, options.pop("name"), splits, sizes, **options))


if __name__ == "__main__":
    run_program(main)
