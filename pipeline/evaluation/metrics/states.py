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
    """What is known about some images of one side. A state takes what it needs."""

    features: Tensor | None = None  # [n, d]
    logits: Tensor | None = None  # [n, k]
    indices: Tensor | None = None  # int64 [n], different for all images of a side
    labels: Tensor | None = None  # int64 [n], the classes that the images should show


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
        assert batch.features is not None, "sums are of features"
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
        assert batch.features is not None, "sums within classes are of features"
        assert batch.logits is not None, "sums within classes take logits"
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

    Rows are float32, as networks give them. Memory is that of `keep` rows and a quarter more; between ranks only the
    rows travel that stay.
    """

    def __init__(self, num_columns: int, keep: int, field: str = "features") -> None:
        self.num_columns, self.keep, self.field = num_columns, keep, field
        self.seen = 0  # images that were added
        self._rows: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._is_sorted = False  # one part, in the order of its indices
        self._bound = ALL  # `keep` images come no later than this in the order; those after it are not needed

    @classmethod
    def of_tensors(cls, tensors: Tensors, keep: int) -> Sample:
        """Returns the sample that has these `tensors`, or its first `keep` rows."""
        sample = cls(tensors["rows"].shape[1], keep)
        sample._rows, sample._indices, sample.seen = [tensors["rows"]], [tensors["indices"]], int(tensors["seen"])
        sample._is_sorted = len(tensors["rows"]) <= keep
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
        indices = indices.cpu()
        chosen = sampling_order(indices) <= self._bound
        self._rows.append(rows.detach()[chosen.to(rows.device)].to("cpu", torch.float32))
        self._indices.append(indices[chosen])
        self.seen, self._is_sorted = self.seen + len(rows), False
        if sum(map(len, self._indices)) > self.keep + self.keep // 4:
            self._drop_after(_last_place(torch.cat(self._indices), self.keep))

    def first(self, count: int = ALL) -> tuple[Tensor, Tensor]:
        """Returns rows float32 [m, d] and their indices int64 [m], ascending, of the first `count` images in
        `rng.sampling_order`, or of all."""
        if not self._is_sorted:
            rows = torch.cat([torch.empty(0, self.num_columns), *self._rows])
            indices = torch.cat([torch.empty(0, dtype=torch.int64), *self._indices])
            rows, indices = _first(rows, indices, self.keep)
            order = indices.argsort()
            self._rows, self._indices, self._is_sorted = [rows[order]], [indices[order]], True
        return _first(self._rows[0], self._indices[0], count)

    def part(self, count: int) -> Sample:
        """Returns the sample of the first `count` images in `rng.sampling_order`."""
        rows, indices = self.first(count)
        return Sample.of_tensors({"rows": rows, "indices": indices, "seen": torch.tensor(len(rows))}, self.keep)

    def gather(self, ranks: Ranks) -> None:
        if ranks.world_size == 1:
            return
        indices = [part for rank in ranks.gather(self._indices) for part in rank]
        self._drop_after(_last_place(torch.cat([torch.empty(0, dtype=torch.int64), *indices]), self.keep))
        all_ranks = ranks.gather((self._rows, self._indices, self.seen))
        self._rows = [part for rows, _, _ in all_ranks for part in rows]
        self._indices = [part for _, indices, _ in all_ranks for part in indices]
        self.seen, self._is_sorted = sum(seen for _, _, seen in all_ranks), False

    def _drop_after(self, bound: int) -> None:
        for number, indices in enumerate(self._indices):  # one by one: joining them first would take the memory twice
            chosen = sampling_order(indices) <= bound
            self._rows[number], self._indices[number] = self._rows[number][chosen], indices[chosen]
        self._bound = bound


def _last_place(indices: Tensor, count: int) -> int:
    """Returns the place in `rng.sampling_order` of the last of the first `count` images among `indices`."""
    return int(sampling_order(indices).kthvalue(count).values) if len(indices) >= count else ALL


def _first(rows: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the rows and indices of the first `count` images in `rng.sampling_order`, in the order that they have."""
    if len(indices) <= count:
        return rows, indices
    chosen = sampling_order(indices) <= _last_place(indices, count)
    return rows[chosen], indices[chosen]
