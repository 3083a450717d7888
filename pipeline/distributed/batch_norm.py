"""Batch norm with the statistics of the global batch, on any device and backend.

torch's own SyncBatchNorm refuses CPU tensors. Every rank has as many rows as the others (`Ranks.rows`), so the mean of
the ranks' means is the mean of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The layers that `convert_batch_norm` replaces."""


class Statistics(NamedTuple):
    """The mean and biased variance of a batch norm's input over `num_values` values of each channel: (channels,), or
    (batches, channels) for several batches."""

    mean: Tensor
    variance: Tensor
    num_values: Tensor | int


@torch.no_grad()
def update_moving_averages(norm: nn.BatchNorm2d, statistics: Statistics) -> None:
    """Moves the moving averages of a batch norm by the statistics of its batches, one after the other, as torch does in
    training mode: r <- r + momentum * (s - r), where the variance s is the unbiased one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    means = statistics.mean.view(-1, norm.num_features)
    unbiased = statistics.variance.view_as(means) * (statistics.num_values / (statistics.num_values - 1))
    norm.num_batches_tracked.add_(len(means))
    for moments in zip(means, unbiased, strict=True):
        torch._foreach_lerp_([norm.running_mean, norm.running_var], moments, norm.momentum)


def convert_batch_norm(network: nn.Module) -> None:
    """Replaces every batch norm of a network by a SyncBatchNorm, in place; parameters and buffers stay the same."""
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, CONVERTED) and type(norm) in CONVERTED:
                converted = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)
                for key, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                    setattr(converted, key, tensor)
                setattr(parent, name, converted)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes, in training mode, the statistics of all ranks' images (n, c, h, w). In users' networks
    there may be inputs (n, c) and (n, c, ...) too."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        if images.ndim == 4:
            return self.normalise([images], [1])[0]
        return self.normalise([images.reshape(*images.shape[:2], -1, 1)], [1])[0].reshape(images.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any number of dimensions, unlike nn.BatchNorm2d."""

    def normalise(self, groups: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Normalises groups of images, of which group i holds `sizes[i]` equal batches, each batch with its own
        statistics. All statistics travel in one collective."""
        groups = [images.to(self.weight.dtype) for images in groups]  # under autocast they are of half precision
        means, variances = _statistics_of_all_ranks(groups, sizes)
        count = groups[-1][:, 0].numel() // sizes[-1] * dist.get_world_size()
        update_moving_averages(self, Statistics(means, variances, count))
        inverses = torch.rsqrt(variances + self.eps)
        parts = zip(groups, torch.split(means, list(sizes)), torch.split(inverses, list(sizes)), strict=True)
        return [self._apply_statistics(images, mean, inverse, count) for images, mean, inverse in parts]

    def _apply_statistics(self, images: Tensor, means: Tensor, inverses: Tensor, count: int) -> Tensor:
        n, c, h, w = images.shape
        # Channels-last images are rows of w * c numbers already, long enough for a CPU's vectors; c alone is not. A
        # GPU prefers to broadcast.
        width = 1 if images.is_cuda else w
        rows = images.permute(0, 2, 3, 1).reshape(len(means), -1, width * c)
        rows = _Normalise.apply(rows, self.weight, self.bias, means, inverses, count)
        normalised: Tensor = rows.view(n, h, w, c).permute(0, 3, 1, 2)
        return normalised


@torch.no_grad()
def _statistics_of_all_ranks(groups: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the means and biased variances (batches, channels) of the global batches, in one collective.

    With equal shares the mean is the mean of the ranks' means m_r, and the variance is the mean of the ranks' variances
    plus the variance of the m_r (Chan et al. 1983, "Algorithms for computing the sample variance"). Unlike a sum of
    squares less a squared sum, this cancels nothing. Each rank writes its numbers into a row of its own and zeros into
    the others, so the sum over the ranks is a gather that is exact and that a CUDA graph can capture.
    """
    statistics = [_statistics(images, size) for images, size in zip(groups, sizes, strict=True)]
    packed = torch.cat([part for parts in zip(*statistics, strict=True) for part in parts])
    ranks = packed.new_zeros(dist.get_world_size(), *packed.shape)
    ranks[dist.get_rank()] = packed
    dist.all_reduce(ranks)
    ranks = ranks.view(len(ranks), 2, sum(sizes), -1)
    means, variances = ranks.mean(0)
    return means, variances.add_(ranks[:, 0].var(0, correction=0))


def _statistics(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the means and biased variances, (size, channels) each, of a group of `size` batches of this rank."""
    if size == 1:  # one pass over the images
        mean, variance = torch.batch_norm_update_stats(images, None, None, 0.0)
        return mean[None], variance[None]
    variances, means = torch.var_mean(images.view(size, -1, *images.shape[1:]), (1, 3, 4), correction=0)
    return means, variances


class _Normalise(torch.autograd.Function):
    """y = (x - mean) * inverse * weight + bias, for rows x (batches, m, w * channels) of which the last dimension
    repeats the channels w times.

    `means` and `inverses` (1 / sqrt(variance + eps)), (batches, channels) each, are those of `count` values of a
    channel, over all ranks' rows of a batch. The gradient, for a single batch, takes into account that they depend on
    x.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, means: Tensor, inverses: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, means, inverses)
        ctx.count = count
        # y = shift + x * scale: one pass over the rows.
        scales = weight * inverses
        shifts = torch.addcmul(bias, means, scales, value=-1)
        return torch.addcmul(_along(rows, shifts), rows, _along(rows, scales))

    @staticmethod
    @once_differentiable  # penalties, which differentiate twice, are refused for critics with batch norm
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Let g = dL/dy, n = (x - mean) * inverse, and E[...] the mean over the `count` values of a channel on all
        ranks. Then (Ioffe & Szegedy 2015, section 3, their six equations combined)

            dL/dbias = sum g,   dL/dweight = sum g n,
            dL/dx = weight * inverse * (g - E[g] - n E[g n]).

        The sums for the parameters are this rank's: DDP averages them with all other gradients. E[...] takes the sums
        of all ranks, in one collective. L is then the sum of the ranks' losses, as everywhere before DDP's average.
        """
        rows, weight, mean, inverse = ctx.saved_tensors
        sums = torch.stack([_by_channel(upstream, mean), _by_channel(upstream * rows, mean)])
        for_bias, products = sums
        for_weight = torch.addcmul(products, mean, for_bias, value=-1).mul_(inverse)  # sum g n from sum g x
        shares = torch.cat([for_bias, for_weight])
        dist.all_reduce(shares)
        bias_mean, weight_mean = (shares / ctx.count).split(len(mean))
        # dL/dx = scale * g + slope * x + shift, with n multiplied out: two passes over the rows.
        scale = weight * inverse
        slope = -scale * inverse * weight_mean
        shift = -scale * bias_mean - slope * mean
        shift, slope, scale = (_along(rows, values) for values in (shift, slope, scale))
        downstream = torch.addcmul(shift, rows, slope).addcmul_(upstream, scale)
        return downstream, for_weight[0], for_bias[0], None, None, None


def _along(rows: Tensor, values: Tensor) -> Tensor:
    """Repeats the channels' values (batches, channels) so that they broadcast to rows (batches, m, w * channels)."""
    if values.shape[1] < rows.shape[2]:
        values = values.repeat(1, rows.shape[2] // values.shape[1])
    return values[:, None]


def _by_channel(rows: Tensor, like: Tensor) -> Tensor:
    """Sums rows (batches, m, w * channels) to (batches, channels), the shape of `like`."""
    sums = rows.sum(1)
    return sums if sums.shape == like.shape else sums.view(len(sums), -1, like.shape[1]).sum(1)
