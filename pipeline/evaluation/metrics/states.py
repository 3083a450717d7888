"""What the scores need of the images of one side, generated or real: sums over all images, and samples of rows.

A state is filled batch by batch, and `gather` joins the states of all ranks. It does not depend on batches or ranks:
sums to their rounding, samples in every bit. States are on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.distributed.collectives import Ranks
from pipeline.rng import sampling_order

Tensors = dict[str, Tensor]
"""The content of a state by name."""
States = dict[str, Any]
"""The states of one side by name."""
ALL = torch.iinfo(torch.int64).max
MOST_SUMS = 2**25  # numbers in the products of all classes (256 MB): with more there is no FID within classes


class Batch(NamedTuple):
    """What is known about some images of one side, None or a tensor each. A state takes what it needs."""

    features: Any = None  # [n, d]
    logits: Any = None  # [n, k]
    indices: Any = None  # int64 [n], different for all images of a side
    labels: Any = None  # int64 [n], the classes that the images should show


def add(states: States, batch: Batch) -> None:
    """Adds a batch to each state of a side."""
    for state in states.values():
        state.add(batch)


def gather(states: States, ranks: Ranks) -> None:
    """Replaces the states of a side, on every rank, by those of all ranks' images."""
    for state in states.values():
        state.gather(ranks)


class _Summed:
    """A state whose `tensors` are sums over images, and over ranks."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def gather(self, ranks: Ranks) -> None:
        all_ranks = ranks.gather(self.tensors)
        self.tensors = {name: torch.stack([rank[name] for rank in all_ranks]).sum(0) for name in self.tensors}


class Sums(_Summed):
    """Number, sum and sum of products of feature vectors [d], float64: 8 (d + 1) d bytes for any number of images."""

    def __init__(self, num_features: int) -> None:
        total = torch.zeros(num_features, dtype=torch.float64)
        super().__init__({"count": torch.tensor(0), "sum": total, "products": total.outer(total)})

    def add(self, batch: Batch) -> None:
        features = batch.features.detach().to("cpu", torch.float64)
        self.tensors["count"] += len(features)
        self.tensors["sum"] += features.sum(0)
        self.tensors["products"].addmm_(features.T, features)


class ClassSums(_Summed):
    """Sums within each class that the classifier sees, and over all images how sure and how right it is; float64."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        classes = num_classes if num_classes * num_features**2 <= MOST_SUMS else 0
        numbers = {name: torch.tensor(0.0).double() for name in ("confidence", "labelled", "recognised")}
        count, total = torch.zeros(num_classes, dtype=torch.int64), torch.zeros(classes, num_features).double()
        products = torch.zeros(classes, num_features, num_features).double()
        super().__init__({"count": count, "sum": total, "products": products, **numbers})

    def add(self, batch: Batch) -> None:
        tensors, logits = self.tensors, batch.logits.detach().cpu()
        classes, features = logits.argmax(1), batch.features.detach().to("cpu", torch.float64)
        tensors["count"] += classes.bincount(minlength=len(tensors["count"]))
        for index in set(classes.tolist()) if len(tensors["sum"]) else ():
            rows = features[classes == index]
            tensors["sum"][index] += rows.sum(0)
            tensors["products"][index].addmm_(rows.T, rows)
        tensors["confidence"] += logits.double().softmax(1).amax(1).sum()
        if batch.labels is not None:
            tensors["labelled"] += len(batch.labels)
            tensors["recognised"] += (classes == batch.labels.cpu()).sum()


class Sample:
    """The rows, features or logits, of at most `keep` images: those whose indices come first in `rng.sampling_order`.

    Rows are float32, as networks give them. Memory is that of `keep` rows and a quarter more, twice while they are
    joined; between ranks only the rows travel that stay.
    """

    def __init__(self, num_columns: int, keep: int, field: str = "features") -> None:
        self.num_columns, self.keep, self.field = num_columns, keep, field
        self.seen = 0  # images that were added
        self._rows, self._indices = [torch.empty(0, num_columns)], [torch.empty(0, dtype=torch.int64)]

    @classmethod
    def of_tensors(cls, tensors: Tensors, keep: int) -> Sample:
        """Returns the sample that has these `tensors`, or its first `keep` rows."""
        sample = cls(tensors["rows"].shape[1], keep)
        sample._rows, sample._indices, sample.seen = [tensors["rows"]], [tensors["indices"]], int(tensors["seen"])
        return sample

    @property
    def tensors(self) -> Tensors:
        rows, indices = self.first()
        return {"rows": rows, "indices": indices, "seen": torch.tensor(self.seen)}

    @property
    def size(self) -> int:
        """The number of rows."""
        return min(self.seen, self.keep)

    def add(self, batch: Batch) -> None:
        """Adds a batch. Without indices rank r of W numbers its images r, r + W, ..., as DistributedSampler deals them.
        Raises ValueError for rows of another width, or another number of indices."""
        rows, indices = getattr(batch, self.field), batch.indices
        if rows is None or rows.ndim != 2 or rows.shape[1] != self.num_columns:
            shape = "none" if rows is None else list(rows.shape)
            raise ValueError(f"{self.field} must be [n, {self.num_columns}], not {shape}")
        if indices is None:
            ranks = Ranks.without_group()
            indices = (self.seen + torch.arange(len(rows))) * ranks.world_size + ranks.rank
        if len(indices) != len(rows):
            raise ValueError(f"there are {len(indices)} indices of {len(rows)} rows")
        self._rows.append(rows.detach().to("cpu", torch.float32, copy=True))
        self._indices.append(indices.cpu())
        self.seen += len(rows)
        if sum(map(len, self._indices)) > self.keep + self.keep // 4:
            self.first()

    def first(self, count: int = ALL) -> tuple[Tensor, Tensor]:
        """Returns rows float32 [m, d] and their indices int64 [m], ascending, of the first `count` images in
        `rng.sampling_order`, or of all."""
        if len(self._rows) > 1 or len(self._indices[0]) > self.keep:
            rows, indices = torch.cat(self._rows), torch.cat(self._indices)
            chosen = _first(indices, self.keep)
            self._rows, self._indices = [rows[chosen]], [indices[chosen]]
        rows, indices = self._rows[0], self._indices[0]
        if count >= len(indices):
            return rows, indices
        chosen = _first(indices, count)
        return rows[chosen], indices[chosen]

    def gather(self, ranks: Ranks) -> None:
        rows, indices = self.first()
        everywhere = torch.cat(ranks.gather(indices))
        stays = torch.isin(indices, everywhere[_first(everywhere, self.keep)])
        all_ranks = ranks.gather((rows[stays], indices[stays], self.seen))
        self._rows, self._indices = [rows for rows, _, _ in all_ranks], [indices for _, indices, _ in all_ranks]
        self.seen = sum(seen for _, _, seen in all_ranks)


def _first(indices: Tensor, count: int) -> Tensor:
    """Returns where among `indices` the first `count` images in `rng.sampling_order` are, by ascending index."""
    chosen = sampling_order(indices).argsort()[:count]
    return chosen[indices[chosen].argsort()]
