"""Writes datasets: known ones, other people's images, an index of existing shards."""

from pipeline.data.prepare.cifar10 import prepare_cifar10
from pipeline.data.prepare.commit import ShardSizes
from pipeline.data.prepare.idx import prepare_fashion_mnist, prepare_mnist
from pipeline.data.prepare.sources import index_shards, prepare_folder, prepare_npz

__all__ = [
    "ShardSizes",
    "index_shards",
    "prepare_cifar10",
    "prepare_fashion_mnist",
    "prepare_folder",
    "prepare_mnist",
    "prepare_npz",
]
