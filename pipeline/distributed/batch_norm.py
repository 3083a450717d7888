"""Batch norm over the ranks: statistics of the global batch on any device and backend; and all images of a step made
together, which is the way to few collectives and launches.

torch's own SyncBatchNorm refuses CPU tensors. Equal slices on all ranks are assumed (`Ranks.rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.models.networks import BATCHES_TOGETHER, Generator, StepGenerator


class Statistics(NamedTuple):
    """Mean and biased variance of a batch norm's input, (channels,) or for several batches (batches, channels) each,
    over `num_values` values of a channel."""

    mean: Tensor
    variance: Tensor
    num_values: Tensor | int


@torch.no_grad()
def update_moving_averages(norm: nn.BatchNorm2d, statistics: Statistics) -> None:
    """What a batch norm in training mode does with the statistics of its batches, one after the other."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    means = statistics.mean.view(-1, norm.num_features)
    unbiased = statistics.variance.view_as(means) * (statistics.num_values / (statistics.num_values - 1))
    norm.num_batches_tracked.add_(len(means))
    for moments in zip(means, unbiased, strict=True):
        torch._foreach_lerp_([norm.running_mean, norm.running_var], moments, norm.momentum)


CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The layers that `convert_batch_norm` replaces."""


class SyncBatchNorm(nn.BatchNorm2d):
    """Images (n, c, h, w) are normalised with the statistics of all ranks' images in training mode; and so are (n, c)
    and (n, c, ...) of a network of the user's."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        if images.ndim == 4:
            return self.normalise([images], [1])[0]
        return self.normalise([images.reshape(*images.shape[:2], -1, 1)], [1])[0].reshape(images.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of them."""

    def normalise(self, groups: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Groups of images, each of so many equal batches; every batch with its own statistics, all of them in one
        collective."""
        groups = [images.to(self.weight.dtype) for images in groups]  # autocast's are of half precision
        means, variances = _statistics_of_all_ranks(groups, sizes)
        count = groups[-1][:, 0].numel() // sizes[-1] * dist.get_world_size()
        update_moving_averages(self, Statistics(means, variances, count))
        inverses = torch.rsqrt(variances + self.eps)
        parts = zip(groups, torch.split(means, list(sizes)), torch.split(inverses, list(sizes)), strict=True)
        return [self._apply_statistics(images, mean, inverse, count) for images, mean, inverse in parts]

    def _apply_statistics(self, images: Tensor, means: Tensor, inverses: Tensor, count: int) -> Tensor:
        n, c, h, w = images.shape
        # Channels-last images are rows of w * c numbers already: long enough for a CPU's vectors, unlike c.
        width = 1 if images.is_cuda else w
        rows = images.permute(0, 2, 3, 1).reshape(len(means), -1, width * c)
        rows = _Normalise.apply(rows, self.weight, self.bias, means, inverses, count)
        normalised: Tensor = rows.view(n, h, w, c).permute(0, 3, 1, 2)
        return normalised


def convert_batch_norm(network: nn.Module) -> None:
    """Replaces every batch norm of a network by one over all ranks, in place; parameters and buffers stay the same."""
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, CONVERTED) and type(norm) in CONVERTED:
                converted = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)
                for own, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                    setattr(converted, own, tensor)
                setattr(parent, name, converted)


class LayerwiseStepGenerator(StepGenerator):
    """All images layer by layer, so that they share each batch norm's collective; its statistics are those of batches.

    A GPU takes the critic's batches as one; a CPU takes one after the other, each of which fits into its cache.
    """

    def forward(
        self, critic_latents: Tensor, critic_labels: Tensor, latents: Tensor, labels: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        each = (torch.split(batches, BATCHES_TOGETHER) for batches in (critic_latents, critic_labels))
        *early, late = (self._groups(*several) for several in zip(*each, strict=True))
        with torch.no_grad():
            fakes = [made for groups in early for made in self._layer_by_layer(groups)]
        *last, images = self._layer_by_layer([*late, (latents[None], labels[None])])
        return torch.cat([*fakes, *last]), [images.flatten(0, 1)]

    def _groups(self, latents: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = len(labels) if labels.is_cuda else 1
        return [*zip(torch.split(latents, size), torch.split(labels, size), strict=True)]

    def _layer_by_layer(self, groups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Images (k, b, C, H, W) of groups of k batches (k, b, latent_dim); only those of the last want gradients."""
        generator, sizes, batch_size = self.generator.train(), [len(z) for z, _ in groups], groups[-1][1].shape[1]
        assert isinstance(generator, Generator), "others know no layers here"

        def each(layer: Callable[..., Tensor], groups: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
            with torch.no_grad():
                done = [layer(*group) for group in groups[:-1]]
            return [*done, layer(*groups[-1])]

        flat = [(latents.flatten(0, 1), labels.flatten()) for latents, labels in groups]
        maps = each(generator.first_maps, flat)
        for norm, convolution in zip(generator.norms, generator.convolutions, strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            normalised = [(images,) for images in normalise(norm, maps, sizes)]
            maps = each(lambda images, layer=convolution: layer(F.relu(images)), normalised)
        images = each(torch.sigmoid, [(images,) for images in maps])
        return [made.view(-1, batch_size, *made.shape[1:]) for made in images]


def normalise(norm: nn.BatchNorm2d, groups: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Groups of images, each of so many equal batches, as batch norm in training mode makes them of every batch."""
    if isinstance(norm, SyncBatchNorm):
        return norm.normalise(groups, sizes)
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(sum(sizes))
    settings = norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps
    normalised = []
    for images, size in zip(groups, sizes, strict=True):
        batches = [F.batch_norm(batch, *settings) for batch in images.chunk(size)]
        normalised.append(torch.cat(batches) if size > 1 else batches[0])
    return normalised


@torch.no_grad()
def _statistics_of_all_ranks(groups: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means and biased variances (batches, channels) from the ranks' own (Chan et al. 1983) in one collective."""
    own = [_statistics(images, size) for images, size in zip(groups, sizes, strict=True)]
    packed = torch.cat([part for parts in zip(*own, strict=True) for part in parts])
    ranks = packed.new_zeros(dist.get_world_size(), *packed.shape)
    ranks[dist.get_rank()] = packed
    dist.all_reduce(ranks)
    ranks = ranks.view(len(ranks), 2, sum(sizes), -1)
    means, variances = ranks.mean(0)
    return means, variances.add_(ranks[:, 0].var(0, correction=0))


def _statistics(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means and biased variances, (size, channels) each, of that many batches."""
    if size == 1:
        mean, variance = torch.batch_norm_update_stats(images, None, None, 0.0)
        return mean[None], variance[None]
    variances, means = torch.var_mean(images.view(size, -1, *images.shape[1:]), (1, 3, 4), correction=0)
    return means, variances


class _Normalise(torch.autograd.Function):
    """(x - mean) * inverse * weight + bias for rows (batches, m, w * channels). `means` and `inverses`, one by the
    standard deviation, (batches, channels), are those of `count` values of a channel over all ranks' rows of a batch,
    and the gradient, for one batch alone, knows that."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, means: Tensor, inverses: Tensor, count: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, means, inverses)
        ctx.count = count
        scales = weight * inverses
        shifts = torch.addcmul(bias, means, scales, value=-1)
        return torch.addcmul(_along(rows, shifts), rows, _along(rows, scales))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse = ctx.saved_tensors
        sums = torch.stack([_by_channel(upstream, mean), _by_channel(upstream * rows, mean)])
        for_bias, products = sums
        for_weight = torch.addcmul(products, mean, for_bias, value=-1).mul_(inverse)
        shares = torch.cat([for_bias, for_weight])
        dist.all_reduce(shares)
        bias_mean, weight_mean = (shares / ctx.count).split(len(mean))
        # scale * (upstream - mean(upstream) - normalised * mean(upstream * normalised))
        scale = weight * inverse
        slope = -scale * inverse * weight_mean
        shift = -scale * bias_mean - slope * mean
        shift, slope, scale = (_along(rows, values) for values in (shift, slope, scale))
        downstream = torch.addcmul(shift, rows, slope).addcmul_(upstream, scale)
        return downstream, for_weight[0], for_bias[0], None, None, None


def _along(rows: Tensor, values: Tensor) -> Tensor:
    """Values (batches, channels) of channels, repeated to what can be added to rows (batches, m, w * channels)."""
    if values.shape[1] < rows.shape[2]:
        values = values.repeat(1, rows.shape[2] // values.shape[1])
    return values[:, None]


def _by_channel(rows: Tensor, like: Tensor) -> Tensor:
    """Sums (batches, channels) over rows (batches, m, w * channels)."""
    sums = rows.sum(1)
    return sums if sums.shape == like.shape else sums.view(len(sums), -1, like.shape[1]).sum(1)
