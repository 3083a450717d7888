"""What needs the distances between all pairs of images: precision, recall, density, coverage, nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.evaluation.interruption import check_interrupted

NEIGHBOURS = 5
# Rows of a distance matrix in memory at once: 5 MB in float32 against 10,000 columns, and 50 MB for all its pairs.
ROWS = 125
STRIDE = 32  # columns whose smallest distance stands for them at first in a search for neighbours
SPARE = 4  # candidates for the nearest neighbours beyond their number


def manifold_scores(
    fake: Tensor, real: Tensor, neighbours: int = NEIGHBOURS, real_radii: Tensor | None = None
) -> dict[str, float]:
    """Returns "precision" and "recall" (Kynkaanniemi et al. 2019, arXiv 1904.06991), "density" and "coverage" (Naeem et
    al. 2020, arXiv 2002.09797), of features [m, d] and [n, d] with balls that reach to the k-th nearest neighbour.

    Precision is the share of fakes inside some real ball, density the mean number of real balls around a fake divided
    by k, recall the share of reals inside some fake ball, coverage the share of real balls that hold a fake. All depend
    on m and n, both above k = `neighbours`. `real_radii` are the `squared_radii` of `real`, where they are known.
    Distances come from float32 matrix products; a pair that is closer to a ball's surface than their rounding is
    decided by the float64 sum of squared differences.
    """
    fake_radii = squared_radii(fake, neighbours)
    if real_radii is None:
        real_radii = squared_radii(real, neighbours)
    pairs = _Pairs(fake, real, finest=min(fake_radii.median().item(), real_radii.median().item()))
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled, covered = torch.zeros_like(real_radii, dtype=torch.bool), torch.zeros_like(real_radii, dtype=torch.bool)
    num_balls = 0
    for start, distances in pairs.blocks():
        check_interrupted()
        recalled[pairs.within(start, distances, fake_radii[start : start + ROWS, None])[1]] = True
        inside, balls = pairs.within(start, distances, real_radii)
        precise[inside], covered[balls] = True, True
        num_balls += len(balls)
    return {
        "precision": precise.double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": num_balls / (neighbours * len(fake)),
        "coverage": covered.double().mean().item(),
    }


def squared_radii(rows: Tensor, neighbours: int) -> Tensor:
    """Returns the squared distance of each row to its k-th nearest other row, float64 [m], m > k = `neighbours`."""
    return _Pairs(rows, rows).nearest(neighbours + 1)[1][:, -1]  # the nearest row is the row itself


def nearest_neighbours(features: Tensor, training: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` rows of `training` [n, d] that are nearest to each row of `features` [m, d], nearest first:
    indices int64 [m, count] and Euclidean distances float64 [m, count]."""
    indices, squares = _Pairs(features, training).nearest(count)
    return indices, squares.sqrt()


class _Pairs:
    """Squared distances between the rows of [m, d] and [n, d]: quick ones, and exact ones where they decide.

    Quick distances are |a|^2 - 2 a.b + |b|^2 by matrix products, within `tolerance` of the float64 sum of squared
    differences, which is exact. They are float32 only if that tolerance is far below the distance `finest`.
    """

    def __init__(self, ours: Tensor, theirs: Tensor, finest: float = torch.inf, dtype: torch.dtype | None = None):
        self.ours, self.theirs = ours, theirs
        norms = [rows.double().square().sum(1, keepdim=True) for rows in (ours, theirs)]

        def rounding(dtype: torch.dtype) -> float:
            """Bounds the rounding of a product of d + 2 columns, whose terms add up to at most four of the largest
            norm, and of the radii."""
            return 2 * (ours.shape[1] + 8) * torch.finfo(dtype).eps * max(norm.max().item() for norm in norms)

        # On other devices, and with another setting of torch's, a float32 product may have the digits of
        # TensorFloat-32.
        quick = ours.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        quick = quick and rounding(torch.float32) < finest / 100
        self.dtype = dtype or (torch.float32 if quick else torch.float64)
        self.tolerance = rounding(self.dtype)
        ours, theirs, *norms = (part.to(self.dtype) for part in (ours, theirs, *norms))
        self._left = torch.cat([-2 * ours, norms[0], torch.ones_like(norms[0])], dim=1)
        self._right = torch.cat([theirs, torch.ones_like(norms[1]), norms[1]], dim=1)

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns the exact distances, float64, of rows and columns int64 that broadcast together. (a, b) and (b, a)
        have the same in every bit."""
        return (self.ours[rows].double() - self.theirs[columns].double()).square().sum(-1)

    def blocks(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yields the first row and the quick distances [r, n] of blocks of ROWS rows. Infinite columns fill n up to a
        multiple of `multiple`. Each block overwrites the one before."""
        columns = -(-len(self.theirs) // multiple) * multiple
        right = self._right.new_zeros(columns, self._right.shape[1])
        right[:, -1] = torch.inf
        right[: len(self._right)] = self._right
        memory = right.new_empty(min(ROWS, len(self._left)), columns)
        for start in range(0, len(self._left), ROWS):
            left = self._left[start : start + ROWS]
            yield start, torch.mm(left, right.T, out=memory[: len(left)])

    def within(self, start: int, distances: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows and columns, int64 [p], of the pairs of a block that are no further apart than the squared
        `radii`, float64 [r, 1] or [n]."""
        rows, columns = (distances <= (radii + self.tolerance).to(self.dtype)).nonzero(as_tuple=True)
        limits = radii[rows, 0] if radii.ndim == 2 else radii[columns]
        inside = distances[rows, columns] <= limits - self.tolerance
        for close in torch.split((~inside).nonzero().flatten(), 2**16):
            inside[close] = self.exact(rows[close] + start, columns[close]) <= limits[close]
        return rows[inside] + start, columns[inside]

    def nearest(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns the columns int64 [m, count] nearest to each row, nearest first, and exact squared distances."""
        candidates = min(count + SPARE, len(self.theirs))
        # torch's search for the smallest numbers of a row takes longer than the distances. So columns are first reduced
        # to the minimum of each stride, and only the strides with the smallest minima are searched.
        stride = STRIDE if len(self.theirs) >= 4 * STRIDE * candidates else 1
        blocks = []
        for start, distances in self.blocks(stride):
            check_interrupted()
            strides = distances.view(len(distances), stride, -1)
            chosen = strides.amin(1).topk(candidates, largest=False).indices
            among = strides.gather(2, chosen.unsqueeze(1).expand(-1, stride, -1)).flatten(1)
            quick, places = among.topk(candidates, largest=False)
            columns = places // candidates * strides.shape[2] + chosen.gather(1, places % candidates)
            rows = torch.arange(start, start + len(distances), device=distances.device)
            squares, order = self.exact(rows.unsqueeze(1), columns).sort(1)
            columns, squares = columns.gather(1, order)[:, :count], squares[:, :count]
            # Only where this holds could a column that is no candidate be nearer than the last neighbour.
            unsure = squares[:, -1] > quick[:, -1] - self.tolerance
            if candidates < len(self.theirs) and self.dtype is torch.float32 and unsure.any():
                again = _Pairs(self.ours[rows[unsure]], self.theirs, dtype=torch.float64)
                columns[unsure], squares[unsure] = again.nearest(count)
            blocks.append((columns, squares))
        columns, squares = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return columns, squares
