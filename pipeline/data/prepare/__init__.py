"""Writes datasets: known ones, other people's images, an index of existing shards."""

import sys
from collections.abc import Callable

from pipeline.data.dataset import Dataset
from pipeline.data.prepare.commit import ShardSizes as ShardSizes
from pipeline.data.prepare.commit import print_line
from pipeline.data.prepare.folder import prepare_folder as prepare_folder
from pipeline.data.prepare.known import prepare_known as prepare_known
from pipeline.data.prepare.known import prepare_mnist as prepare_mnist
from pipeline.data.prepare.npz import prepare_npz as prepare_npz
from pipeline.data.prepare.shards import index_shards as index_shards
from pipeline.data.prepare.tables import prepare_dataset as prepare_dataset
from pipeline.data.prepare.tables import prepare_hf, prepare_parquet
from pipeline.errors import UserError

SOURCES: dict[str, tuple[Callable[..., Dataset], str, str]] = {
    "folder": (prepare_folder, "PATH", "image files; subfolders are classes, or train/ and test/"),
    "npz": (prepare_npz, "PATH", "an .npz file: arrays images (or x_train, arr_0) and maybe labels"),
    "hf": (prepare_hf, "SPLIT", "a dataset of the Hugging Face Hub, or a folder of its formats or of save_to_disk"),
    "parquet": (prepare_parquet, "PATTERN", "parquet files of encoded images: folders, files; *, {00..12}"),
    "shards": (
        index_shards,
        "PATTERN",
        "existing WebDataset shards, which stay where they are: folders, files, URLs; *, {00..12}",
    ),
}
"""The subcommands for a user's images, with what their training images are given by and the text of their help."""


def finish(dataset: Dataset) -> None:
    """Prints a line if the generator does not reach the images' size, and, for a program that reads it, the dataset's
    folder: a person has read it in the summary."""
    from pipeline.models.networks import check_sides

    try:
        check_sides(*dataset.image_shape[1:])
    except UserError as error:
        print_line(f"only networks of your own can train on it; images can be scored against it: {error}")
    if not sys.stdout.isatty():
        print(dataset.folder)
