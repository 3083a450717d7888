"""What is kept of images for their scores: sums over all of them, and samples of their features.

The states of one side, generated or real images, do not depend on batches or on the number of ranks: sums to their
rounding, samples in every bit. They live on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.distributed.collectives import Ranks
from pipeline.rng import sampling_order

State = dict[str, Tensor]
"""The tensors of a state by name."""
Poll = Callable[[], object]
"""Called between parts of a long computation; it ends one by raising."""
LAST = torch.iinfo(torch.int64).max
MOST_SUMS = 2**25
"""Numbers in the sums of products of all classes (256 MB): of more classes or features there is no FID within
classes."""


def never_ends() -> None:
    """The Poll of a computation that nobody interrupts."""


class Batch(NamedTuple):
    """What is known of some images of one side; a state takes what it needs."""

    features: Tensor | None = None
    """[n, d]."""
    logits: Tensor | None = None
    """[n, k]."""
    indices: Tensor | None = None
    """int64 [n], which no two images of a side share."""
    labels: Tensor | None = None
    """int64 [n], the classes that the images were asked to show."""


class Summed:
    """A state that is the sum of all ranks' states."""

    def __init__(self, tensors: State) -> None:
        self._state = tensors

    def gather(self, ranks: Ranks) -> None:
        """Becomes, on every rank, the state of all ranks' images."""
        everyone = ranks.gather(self._state)
        self._state = {name: torch.stack([each[name] for each in everyone]).sum(0) for name in self._state}

    def state(self) -> State:
        """Returns its tensors, to be kept."""
        return self._state


class Sums(Summed):
    """Number, sum and sum of products of feature vectors [d], float64: 8 (d + 1) d bytes, however many images."""

    def __init__(self, num_features: int) -> None:
        total = torch.zeros(num_features, dtype=torch.float64)
        super().__init__({"count": torch.tensor(0), "sum": total, "products": total.outer(total)})

    def add(self, batch: Batch) -> None:
        """Takes some more images."""
        assert batch.features is not None, "sums are of features"
        features, state = batch.features.detach().to("cpu", torch.float64), self._state
        products = torch.addmm(state["products"], features.T, features)
        self._state = {"count": state["count"] + len(features), "sum": state["sum"] + features.sum(0)}
        self._state["products"] = products


class ClassSums(Summed):
    """Sums within each class by the classifier's verdict, and how sure and how right that is, float64."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        summed = num_classes if num_classes * num_features**2 <= MOST_SUMS else 0
        count, total = torch.zeros(num_classes, dtype=torch.int64), torch.zeros(summed, num_features).double()
        products = torch.zeros(summed, num_features, num_features).double()
        numbers = {name: torch.tensor(0.0).double() for name in ("confidence", "labelled", "recognised")}
        super().__init__({"count": count, "sum": total, "products": products, **numbers})

    def add(self, batch: Batch) -> None:
        assert batch.features is not None, "sums within classes are of features"
        assert batch.logits is not None, "sums within classes take logits"
        state, logits = self._state, batch.logits.detach().cpu()
        classes, features = logits.argmax(1), batch.features.detach().to("cpu", torch.float64)
        state["count"] += classes.bincount(minlength=len(state["count"]))
        for index in set(classes.tolist()) if len(state["sum"]) else ():
            rows = features[classes == index]
            state["sum"][index] += rows.sum(0)
            state["products"][index].addmm_(rows.T, rows)
        state["confidence"] += logits.double().softmax(1).amax(1).sum()
        if batch.labels is not None:
            state["labelled"] += len(batch.labels)
            state["recognised"] += (classes == batch.labels.cpu()).sum()


class Sample:
    """The rows, features or logits, of at most `keep` images: those that come first in `rng.sampling_order` of their
    indices, float32 as networks give them.

    Sorted by index, so the rows are the same bits for any number of ranks and any batches, and up to `keep` images they
    are all. Memory is `keep` rows and a quarter; between ranks travel only those that stay.
    """

    def __init__(self, num_columns: int, keep: int, field: str = "features") -> None:
        self.num_columns, self.keep, self.field = num_columns, keep, field
        self.seen = 0
        self._rows: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._bound = LAST  # `keep` images come no later than this in the order: those after it are not needed

    def add(self, batch: Batch) -> None:
        """Without indices rank r of W numbers its images r, r + W, ... as they come, as DistributedSampler deals
        them."""
        rows, indices = getattr(batch, self.field), batch.indices
        if rows is None or rows.ndim != 2 or rows.shape[1] != self.num_columns:
            given = "none" if rows is None else list(rows.shape)
            raise ValueError(f"{self.field} must be [n, {self.num_columns}], not {given}")
        if indices is None:
            ranks = Ranks.silent()
            indices = (self.seen + torch.arange(len(rows))) * ranks.world_size + ranks.rank
        if len(indices) != len(rows):
            raise ValueError(f"there are {len(indices)} indices of {len(rows)} rows")
        indices = indices.cpu()
        chosen = sampling_order(indices) <= self._bound
        self._rows.append(rows.detach()[chosen.to(rows.device)].to("cpu", torch.float32))
        self._indices.append(indices[chosen])
        self.seen += len(rows)
        if sum(map(len, self._indices)) > self.keep + self.keep // 4:
            self._drop_after(self._last_place(torch.cat(self._indices)))

    def first(self, count: int = LAST) -> tuple[Tensor, Tensor]:
        """Returns rows float32 [m, num_columns] and their indices int64 [m], ascending: the first `count` of the order,
        or all that are kept if those are fewer."""
        rows = torch.cat([torch.empty(0, self.num_columns), *self._rows])
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *self._indices])
        if len(indices) > min(count, self.keep):
            first = sampling_order(indices) <= self._last_place(indices, count)
            rows, indices = rows[first], indices[first]
        order = indices.argsort()
        return rows[order], indices[order]

    def gather(self, ranks: Ranks) -> None:
        if ranks.world_size == 1:
            return
        of_all = [indices for each in ranks.gather(self._indices) for indices in each]
        self._drop_after(self._last_place(torch.cat([torch.empty(0, dtype=torch.int64), *of_all])))
        everyone = ranks.gather((self._rows, self._indices, self.seen))
        self._rows = [rows for each, _, _ in everyone for rows in each]
        self._indices = [indices for _, each, _ in everyone for indices in each]
        self.seen = sum(seen for _, _, seen in everyone)

    def state(self) -> State:
        rows, indices = self.first()
        return {"rows": rows, "indices": indices, "seen": torch.tensor(self.seen)}

    @classmethod
    def of_state(cls, state: State, keep: int) -> Sample:
        """Returns what `state` gave, or the first `keep` of it."""
        sample = cls(state["rows"].shape[1], keep)
        sample._rows, sample._indices, sample.seen = [state["rows"]], [state["indices"]], int(state["seen"])
        return sample

    def _last_place(self, indices: Tensor, count: int = LAST) -> int:
        """Returns the place in the order of the last image to keep of these."""
        keep = min(self.keep, count)
        return int(sampling_order(indices).kthvalue(keep).values) if len(indices) >= keep else LAST

    def _drop_after(self, bound: int) -> None:
        for number, indices in enumerate(self._indices):  # one by one: joining them first would take the memory twice
            chosen = sampling_order(indices) <= bound
            self._rows[number], self._indices[number] = self._rows[number][chosen], indices[chosen]
        self._bound = bound
