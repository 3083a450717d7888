"""What the metrics share: `update`'s signature, and states that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from pipeline.distributed.collectives import Ranks
from pipeline.rng import sampling_order

State = dict[str, Tensor]
"""One side of a metric: its tensors by name."""
Poll = Callable[[], object]
"""Called between parts of a long computation; it ends one by raising."""
LAST = torch.iinfo(torch.int64).max


def never_ends() -> None:
    """The Poll of who is not interrupted."""


class FeatureMetric(Metric):
    """A score of generated images (`real=False`) against real ones, from features that anybody computed.

    Every subclass has `update(features, real, ...)` (by keyword in a `MetricCollection`, which hands each metric what
    it takes) and a `compute` that returns float64 tensors, NaN where so few images give no score. Its states are named
    `fake_...` and `real_...`. Moving a metric to a device or asking it for another type leaves their types alone:
    torchmetrics' own `.to(torch.float32)` rounds sums.
    """

    is_differentiable = False
    full_state_update = True
    """`forward` updates first and computes the batch's value apart, so images are numbered on from those before."""

    def __init__(self, **options: Any) -> None:
        """`options` are torchmetrics' own."""
        super().__init__(**options)
        self.poll: Poll = never_ends
        """Called in the midst of a `compute` that takes seconds; whoever wants to end one puts its own here."""

    def merge(self, ranks: Ranks) -> None:
        """Every rank has the states of all from here on, and computes without asking (`sync_on_compute=False`).

        torchmetrics' own `sync` takes them back after one `compute`.
        """
        self.sync(should_sync=ranks.world_size > 1, process_group=ranks.host_group)
        self._is_synced, self._cache = False, None
        self._update_count += 1  # the images may all have been other ranks': torchmetrics would warn

    def side(self, *, real: bool) -> State:
        """What updates with this `real` have left, to be kept and given to `load_side`."""
        prefix = _prefix(real)
        states = {name.removeprefix(prefix): getattr(self, name) for name in self._defaults if name.startswith(prefix)}
        return {name: value for name, value in states.items() if isinstance(value, Tensor)}

    def load_side(self, state: State, *, real: bool) -> None:
        """Replaces a side by what `side` gave of either side of such a metric (a sample may come from a larger one)."""
        for name, value in state.items():
            is_list = isinstance(self._defaults[_prefix(real) + name], list)
            setattr(self, _prefix(real) + name, [value] if is_list else value.clone())
        self._update_count += 1
        self._computed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = ()) -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)


class SampleMetric(FeatureMetric):
    """Keeps the rows of at most `keep` images a side: those that come first in `rng.sampling_order` of their indices.

    Sorted by index, so the rows are the same bits for any number of ranks and any batches, and up to `keep` images they
    are all. They are float32, as networks give them. Memory is `keep` rows and a quarter; between ranks travel only
    those that stay, so one without images, or with more updates than others, does no harm.
    """

    fake_seen: Tensor
    real_seen: Tensor

    def __init__(self, num_columns: int, keep: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_columns, self.keep = num_columns, keep
        for prefix in ("fake_", "real_"):
            self.add_state(f"{prefix}rows", [], dist_reduce_fx="cat")
            self.add_state(f"{prefix}indices", [], dist_reduce_fx="cat")
            self.add_state(f"{prefix}seen", torch.tensor(0), dist_reduce_fx="sum")
            # `keep` images come no later than this in the order, so those after it are not needed.
            self.add_state(f"{prefix}bound", torch.tensor(LAST), dist_reduce_fx="min")
        # A MetricCollection lets metrics share their states when those are equal after the first update.
        self.add_state("keeps", torch.tensor(keep), dist_reduce_fx="max")

    def add(self, rows: Tensor, real: bool, indices: Tensor | None) -> None:
        """Rows [n, num_columns] of the images with these indices int64 [n], which no two images of a side share.

        Without indices rank r of W numbers its images r, r + W, ... as they come, as DistributedSampler deals them.
        """
        if rows.ndim != 2 or rows.shape[1] != self.num_columns:
            raise ValueError(f"{type(self).__name__} takes [n, {self.num_columns}], not {list(rows.shape)}")
        prefix = _prefix(real)
        seen = getattr(self, f"{prefix}seen")
        if indices is None:
            ranks = Ranks.silent()
            indices = (int(seen) + torch.arange(len(rows))) * ranks.world_size + ranks.rank
        if len(indices) != len(rows):
            raise ValueError(f"{type(self).__name__} got {len(indices)} indices of {len(rows)} rows")
        chosen = sampling_order(indices) <= getattr(self, f"{prefix}bound").to(indices.device)
        getattr(self, f"{prefix}rows").append(rows.detach()[chosen.to(rows.device)].to(self.device, torch.float32))
        getattr(self, f"{prefix}indices").append(indices[chosen].to(self.device))
        setattr(self, f"{prefix}seen", seen + len(rows))
        if sum(map(len, getattr(self, f"{prefix}indices"))) > self.keep + self.keep // 4:
            self._drop_after(prefix, self._bound(torch.cat(getattr(self, f"{prefix}indices"))))

    def sample(self, *, real: bool, count: int = LAST) -> tuple[Tensor, Tensor]:
        """Rows float32 [m, num_columns] and their indices int64 [m], ascending: the first `count` of the order, or all
        that are kept if those are fewer."""
        rows, indices = self._kept(_prefix(real))
        if len(indices) > min(count, self.keep):
            first = sampling_order(indices) <= self._bound(indices, count)
            rows, indices = rows[first], indices[first]
        order = indices.argsort()
        return rows[order], indices[order]

    def side(self, *, real: bool) -> State:
        rows, indices = self.sample(real=real)
        return super().side(real=real) | {"rows": rows, "indices": indices}

    @property
    def num_used(self) -> list[int]:
        """How many generated and real images the score is of."""
        return [min(int(seen), self.keep) for seen in (self.fake_seen, self.real_seen)]

    def _kept(self, prefix: str) -> tuple[Tensor, Tensor]:
        rows, indices = getattr(self, f"{prefix}rows"), getattr(self, f"{prefix}indices")
        if isinstance(rows, Tensor):  # after a sync
            return rows, indices
        empty = torch.empty(0, self.num_columns, device=self.device)
        return torch.cat([empty, *rows]), torch.cat([empty.new_empty(0, dtype=torch.int64), *indices])

    def _bound(self, indices: Tensor, count: int = LAST) -> Tensor:
        """The place in the order of the last image to keep of these."""
        keep = min(self.keep, count)
        return sampling_order(indices).kthvalue(keep).values if len(indices) >= keep else torch.tensor(LAST)

    def _drop_after(self, prefix: str, bound: Tensor) -> None:
        rows, indices = getattr(self, f"{prefix}rows"), getattr(self, f"{prefix}indices")
        for number, part in enumerate(indices):  # part by part: joining them first would take the memory twice
            chosen = sampling_order(part) <= bound.to(part.device)
            rows[number], indices[number] = rows[number][chosen], part[chosen]
        setattr(self, f"{prefix}bound", bound.to(self.device))

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        for prefix in ("fake_", "real_"):
            rows, indices = self._kept(prefix)
            everyone = torch.cat(dist_sync_fn(indices, group=process_group or self.process_group))
            setattr(self, f"{prefix}rows", [rows])  # one tensor a rank, whatever its updates were
            setattr(self, f"{prefix}indices", [indices])
            self._drop_after(prefix, self._bound(everyone))
        super()._sync_dist(dist_sync_fn, process_group)


def _prefix(real: bool) -> str:
    return "real_" if real else "fake_"
