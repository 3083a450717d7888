"""The real images: datasets on disk, and the sources that training reads batches from. README.md explains the files.

Importing it takes neither torch nor numpy.
"""

from pipeline.data.dataset import (
    KINDS,
    KNOWN,
    DataError,
    Dataset,
    Shard,
    existing_dataset,
    load_dataset,
    open_dataset,
)
from pipeline.data.source import Batch, Source, check_source, open_source, source_kind

__all__ = [
    "KINDS",
    "KNOWN",
    "Batch",
    "DataError",
    "Dataset",
    "Shard",
    "Source",
    "check_source",
    "existing_dataset",
    "load_dataset",
    "open_dataset",
    "open_source",
    "source_kind",
]
