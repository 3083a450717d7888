"""The real images: datasets on disk, and the sources that training reads batches from. README.md explains the files.

Importing it takes neither torch nor numpy.
"""

from pipeline.data.dataset import KINDS as KINDS
from pipeline.data.dataset import KNOWN as KNOWN
from pipeline.data.dataset import DataError as DataError
from pipeline.data.dataset import Dataset as Dataset
from pipeline.data.dataset import Shard as Shard
from pipeline.data.dataset import existing_dataset as existing_dataset
from pipeline.data.dataset import load_dataset as load_dataset
from pipeline.data.dataset import open_dataset as open_dataset
from pipeline.data.source import Batch as Batch
from pipeline.data.source import Source as Source
from pipeline.data.source import check_source as check_source
from pipeline.data.source import open_source as open_source
from pipeline.data.source import source_kind as source_kind
