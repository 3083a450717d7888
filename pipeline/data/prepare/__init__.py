"""Writes datasets: known ones, other people's images, an index of existing shards."""

from pipeline.data.prepare.commit import ShardSizes
from pipeline.data.prepare.folder import prepare_folder
from pipeline.data.prepare.known import prepare_known, prepare_mnist
from pipeline.data.prepare.npz import prepare_npz
from pipeline.data.prepare.shards import index_shards

__all__ = ["ShardSizes", "index_shards", "prepare_folder", "prepare_known", "prepare_mnist", "prepare_npz"]
