"""Writes datasets: known ones, other people's images, an index of existing shards."""

from collections.abc import Callable

from pipeline.data.dataset import Dataset
from pipeline.data.prepare.commit import ShardSizes, print_line
from pipeline.data.prepare.folder import prepare_folder
from pipeline.data.prepare.known import prepare_known, prepare_mnist
from pipeline.data.prepare.npz import prepare_npz
from pipeline.data.prepare.shards import index_shards
from pipeline.data.prepare.tables import prepare_dataset, prepare_hf, prepare_parquet
from pipeline.errors import UserError

SOURCES: dict[str, tuple[Callable[..., Dataset], str]] = {
    "folder": (prepare_folder, "image files; classes are subfolders"),
    "npz": (prepare_npz, "an .npz file: arrays images (or x_train, arr_0) and maybe labels"),
    "hf": (prepare_hf, "a dataset of the Hugging Face Hub, or a folder of its formats or of save_to_disk"),
    "parquet": (prepare_parquet, "parquet files of encoded images: folders, files; *, {00..12}"),
    "shards": (
        index_shards,
        "existing WebDataset shards, which stay where they are: folders, files, URLs; *, {00..12}",
    ),
}
"""The subcommands for a user's images, with the text of their help."""


def warn_of_size(dataset: Dataset) -> Dataset:
    """Returns the dataset, and prints a line if the generator does not reach its images' size."""
    from pipeline.models.networks import check_sides

    try:
        check_sides(*dataset.image_shape[1:])
    except UserError as error:
        print_line(f"for evaluation, or networks of your own, alone: {error}")
    return dataset


__all__ = [
    "SOURCES",
    "ShardSizes",
    "index_shards",
    "prepare_dataset",
    "prepare_folder",
    "prepare_known",
    "prepare_mnist",
    "prepare_npz",
    "warn_of_size",
]
