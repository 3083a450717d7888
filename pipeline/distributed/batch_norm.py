"""Batch norm over the ranks: statistics of the global batch on any device and backend.

torch's own SyncBatchNorm refuses CPU tensors. Equal slices on all ranks are assumed (`Ranks.rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.models.networks import Generator


class Statistics(NamedTuple):
    """Mean and biased variance of a batch norm's input, (channels,) each, over `num_values` values of a channel."""

    mean: Tensor
    variance: Tensor
    num_values: Tensor | int


@torch.no_grad()
def update_moving_averages(norm: nn.BatchNorm2d, statistics: Statistics) -> None:
    """What a batch norm in training mode does with its batch's statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(statistics.mean, norm.momentum)
    unbiased = statistics.variance * (statistics.num_values / (statistics.num_values - 1))
    norm.running_var.lerp_(unbiased, norm.momentum)


class SyncBatchNorm(nn.BatchNorm2d):
    """Images (n, c, h, w) are normalised with the statistics of all ranks' images in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        return self.normalise_batches([images])[0]

    def normalise_batches(self, batches: list[Tensor]) -> list[Tensor]:
        """Each batch with its own statistics, all of them in one collective."""
        if not self.training:
            return [super(SyncBatchNorm, self).forward(images) for images in batches]
        batches = [images.to(self.weight.dtype) for images in batches]  # autocast's are of half precision
        statistics = zip(*_statistics_of_all_ranks(batches), strict=True)
        return [self._normalise(images, *found) for images, found in zip(batches, statistics, strict=True)]

    def _normalise(self, images: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        n, c, h, w = images.shape
        count = n * h * w * dist.get_world_size()
        update_moving_averages(self, Statistics(mean, variance, count))
        # Channels-last images are rows of w * c numbers already: long enough for a CPU's vectors, unlike c.
        rows = images.permute(0, 2, 3, 1).reshape(n * h, w * c)
        rows = _Normalise.apply(rows, self.weight, self.bias, mean, torch.rsqrt(variance + self.eps), count)
        normalised: Tensor = rows.view(n, h, w, c).permute(0, 3, 1, 2)
        return normalised


def convert_batch_norm(network: nn.Module) -> None:
    """Replaces every batch norm of a network by one over all ranks, in place; parameters and buffers stay the same."""
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.BatchNorm2d:
                converted = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)
                converted._parameters, converted._buffers = norm._parameters, norm._buffers
                setattr(parent, name, converted)


@torch.no_grad()
def make_fakes_together(
    generator: Generator, latents: Tensor, labels: Tensor, autocast: Callable[[], AbstractContextManager[None]]
) -> Tensor:
    """Images (k, b, C, H, W) of k batches of latents (k, b, latent_dim), layer by layer: they share each batch norm's
    collective, and each batch still fits into a CPU's cache. The generator's batch norms are converted."""
    with autocast():
        batches = [generator.first_maps(*batch) for batch in zip(latents, labels, strict=True)]
        for norm, convolution in zip(generator.norms, generator.convolutions, strict=True):
            assert isinstance(norm, SyncBatchNorm)
            batches = [convolution(F.relu(images)) for images in norm.normalise_batches(batches)]
        return torch.stack([torch.sigmoid(images) for images in batches]).to(latents.dtype)


def _statistics_of_all_ranks(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (batches, channels) each, from the ranks' own (Chan et al. 1983) in one collective."""
    own = torch.stack(
        [torch.cat(torch.batch_norm_update_stats(images.detach(), None, None, 0.0)) for images in batches]
    )
    ranks = own.new_zeros(dist.get_world_size(), *own.shape)
    ranks[dist.get_rank()] = own
    dist.all_reduce(ranks)
    means, variances = ranks.chunk(2, dim=2)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class _Normalise(torch.autograd.Function):
    """(x - mean) * inverse * weight + bias for rows (m, w * channels). `mean` and `inverse`, one by the standard
    deviation, are those of `count` values of a channel over all ranks' rows, and the gradient knows that."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, mean, inverse)
        ctx.count = count
        w, scale = rows.shape[1] // len(weight), weight * inverse
        return torch.addcmul((bias - mean * scale).repeat(w), rows, scale.repeat(w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse = ctx.saved_tensors
        w = rows.shape[1] // len(weight)
        for_bias = upstream.sum(0).view(w, -1).sum(0)
        for_weight = ((upstream * rows).sum(0).view(w, -1).sum(0) - mean * for_bias) * inverse
        sums = torch.stack([for_bias, for_weight])
        dist.all_reduce(sums)
        bias_mean, weight_mean = sums / ctx.count
        # scale * (upstream - mean(upstream) - normalised * mean(upstream * normalised))
        scale = weight * inverse
        slope = -scale * inverse * weight_mean
        shift = -scale * bias_mean - slope * mean
        downstream = torch.addcmul(shift.repeat(w), rows, slope.repeat(w)).addcmul_(upstream, scale.repeat(w))
        return downstream, for_weight, for_bias, None, None, None
