"""Writes datasets: MNIST, other people's images, an index of existing shards."""

from pipeline.data.prepare.commit import ShardSizes
from pipeline.data.prepare.mnist import prepare_mnist
from pipeline.data.prepare.sources import index_shards, prepare_folder, prepare_npz

__all__ = ["ShardSizes", "index_shards", "prepare_folder", "prepare_mnist", "prepare_npz"]
