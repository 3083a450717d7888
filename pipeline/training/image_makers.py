"""Two other ways than `StepGenerator`'s to make all images of a step, for the reference's generator alone: layer by
layer, which takes fewer collectives and launches, and in micro-batches, which takes less memory.

The losses of micro-batches can simply be averaged, and so can the critic's gradients: an image's score depends on that
image alone. The generator's batch norm is the difficulty, because through its statistics each image depends on the
whole batch, over all ranks. `AccumulatingGenerator` measures the statistics of the whole batch first, treats them as
inputs of the micro-batches, and passes their gradients on at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed.batch_norm import Statistics, SyncBatchNorm, update_moving_averages
from pipeline.distributed.collectives import Ranks
from pipeline.models.networks import BATCHES_TOGETHER, Generator, StepGenerator


class LayerwiseStepGenerator(StepGenerator):
    """A StepGenerator that takes all images of a step through the network layer by layer.

    Batch by batch, a step with n_critic critic batches would have n_critic + 1 collectives for each batch norm. But all
    batches are known before the step begins, and the generator's weights do not change before its own update. So every
    layer takes all batches at once, and at each batch norm the statistics of all batches, which stay separate, travel
    in one collective. The results are those of one batch after the other; moving averages too move in that order.

    A GPU takes the critic's batches as one group, for few launches. A CPU takes a group for each batch, which fits into
    its cache. At most BATCHES_TOGETHER batches are in memory at a time.
    """

    def forward(
        self, critic_latents: Tensor, critic_labels: Tensor, latents: Tensor, labels: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        portions = (torch.split(batches, BATCHES_TOGETHER) for batches in (critic_latents, critic_labels))
        *early, late = (self._groups(*portion) for portion in zip(*portions, strict=True))
        with torch.no_grad():
            fakes = [batch for groups in early for images in self._layer_by_layer(groups) for batch in images]
        # The generator's own batch shares the collectives of the last portion, and is the only one with gradients.
        *last, images = self._layer_by_layer([*late, (latents[None], labels[None])])
        return [*fakes, *(batch for images in last for batch in images)], [*images]

    def _groups(self, latents: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not len(labels):
            return []
        size = len(labels) if labels.is_cuda else 1
        return [*zip(torch.split(latents, size), torch.split(labels, size), strict=True)]

    def _layer_by_layer(self, groups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Makes images (k, b, C, H, W) of each group of latents (k, b, latent_dim) and labels (k, b). Only the last
        group's have gradients."""
        generator, sizes, batch_size = self.generator.train(), [len(z) for z, _ in groups], groups[-1][1].shape[1]
        assert isinstance(generator, Generator), "the layers of a user's network are not known"

        def apply(layer: Callable[..., Tensor], groups: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
            with torch.no_grad():
                outputs = [layer(*group) for group in groups[:-1]]
            return [*outputs, layer(*groups[-1])]

        flat = [(latents.flatten(0, 1), labels.flatten()) for latents, labels in groups]
        maps = apply(generator.first_maps, flat)
        for norm, convolution in zip(generator.norms, generator.convolutions, strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            normalised = [(images,) for images in normalise(norm, maps, sizes)]
            maps = apply(lambda images, layer=convolution: layer(F.relu(images)), normalised)
        images = apply(torch.sigmoid, [(images,) for images in maps])
        return [group.view(-1, batch_size, *group.shape[1:]) for group in images]


def normalise(norm: nn.BatchNorm2d, groups: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Normalises groups of images, of which group i holds `sizes[i]` equal batches, as `norm` in training mode does
    with one batch after the other; synchronised over the ranks or not."""
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


@dataclass
class AccumulatingGenerator:
    """Makes the images of a step as `StepGenerator` does, in micro-batches and with exact gradients.

    Args:
        generator: the state's, of the reference's kind, since the layers of a user's network are not known.
        micro_batches: their number, which divides a rank's rows of a batch.
        fakes_by_batch: see `StepGenerator`.
        autocast: makes the context of a forward pass: the arithmetic of `runtime.precision`.
    """

    generator: Generator
    micro_batches: int
    fakes_by_batch: bool
    ranks: Ranks
    autocast: Callable[[], AbstractContextManager[None]]

    def __call__(
        self, critic_latents: Tensor, critic_labels: Tensor, latents: Tensor, labels: Tensor
    ) -> tuple[list[Tensor], Iterator[Tensor]]:
        """Returns the critic's k batches (b, C, H, W) without a graph, and `images_for_update` of the other latents."""
        generator = self.generator.train(self.fakes_by_batch)
        fakes = [self._make_fakes(z, y) for z, y in zip(critic_latents, critic_labels, strict=True)]
        generator.train()
        return fakes, self.images_for_update(latents, labels)

    def images_for_update(self, latents: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yields the images of one micro-batch after the other, with their graph. The caller takes a backward pass
        through each before it asks for the next, and asks once more after the last.

        Let x be a batch norm's input, m and v its mean and biased variance over the N values of a channel in the whole
        batch. With m and v held fixed as leaves, the backward passes of the micro-batches give the gradients of the
        parameters at fixed statistics, and dL/dm and dL/dv summed over the micro-batches. What is missing is that L
        depends on x through m and v too:

            dL/dx += dL/dm * dm/dx + dL/dv * dv/dx,   dm/dx = 1 / N,   dv/dx = 2 (x - m) / N.

        This term is passed on from the last batch norm to the first. All of it costs about three times the work of a
        plain backward pass.
        """
        # 1. The statistics of the whole batch, as leaves that collect dL/dm and dL/dv.
        statistics = [
            Statistics(mean.requires_grad_(), variance.requires_grad_(), count)
            for mean, variance, count in self._measure(latents, labels)
        ]
        # 2. The micro-batches at these statistics. After the last of them every leaf holds this rank's dL/dm and dL/dv.
        for z, y in self._micro_batches(latents, labels):
            yield self._forward(z, y, statistics)
        # 3. The missing term, last batch norm first: on its way down from x it adds to dL/dm and dL/dv of the batch
        #    norms before, which must be complete before their own turn comes. Activations were freed with each
        #    micro-batch, so x is computed again, up to that layer.
        for depth in reversed(range(len(statistics))):
            mean, variance, count = statistics[depth]
            assert mean.grad is not None
            assert variance.grad is not None
            # Every rank's loss depends on these statistics, so the sum over the ranks is sent back on each of them.
            for_mean, for_variance = (self.ranks.sum(torch.stack([mean.grad, variance.grad])) / count)[..., None, None]
            for z, y in self._micro_batches(latents, labels):
                values = self._forward(z, y, statistics, depth)
                deviation = values.detach() - mean.detach()[:, None, None]
                torch.autograd.backward(values, for_mean + 2 * for_variance * deviation)

    @torch.no_grad()
    def _make_fakes(self, latents: Tensor, labels: Tensor) -> Tensor:
        statistics = self._measure(latents, labels) if self.generator.training else None
        return torch.cat([self._forward(z, y, statistics) for z, y in self._micro_batches(latents, labels)])

    @torch.no_grad()
    def _measure(self, latents: Tensor, labels: Tensor) -> list[Statistics]:
        """Measures the statistics of the global batch before each batch norm, and moves its moving averages.

        One layer after the other, since each sees what those before it have normalised: for L batch norms about L / 2
        forward passes. Sums are float64, because the variance is a difference of two large ones.
        """
        statistics: list[Statistics] = []
        for depth, norm in enumerate(self.generator.norms):
            sums = torch.zeros((), dtype=torch.float64, device=latents.device)
            for z, y in self._micro_batches(latents, labels):
                values = self._forward(z, y, statistics, depth).double()
                moments = [values, values.square(), torch.ones_like(values)]
                sums = sums + torch.stack([moment.sum((0, 2, 3)) for moment in moments])
            total, squares, count = self.ranks.sum(sums)
            mean = total / count
            measured = (mean, squares / count - mean.square(), count)
            statistics.append(Statistics(*(value.to(latents.dtype) for value in measured)))
            assert isinstance(norm, nn.BatchNorm2d)
            update_moving_averages(norm, statistics[-1])
        return statistics

    def _micro_batches(self, latents: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(latents.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True)

    def _forward(
        self, latents: Tensor, labels: Tensor, statistics: list[Statistics] | None, depth: int | None = None
    ) -> Tensor:
        """Takes the generator's forward pass with `statistics` in its batch norms (None: with the moving averages);
        `depth` stops before that batch norm and returns its input."""
        generator = self.generator
        if statistics is None:
            made: Tensor = generator(latents, labels)
            return made
        with self.autocast():
            images = generator.first_maps(latents, labels)
            for index, (norm, convolution) in enumerate(zip(generator.norms, generator.convolutions, strict=True)):
                if index == depth:
                    return images.to(latents.dtype)
                assert isinstance(norm, nn.BatchNorm2d)
                mean, variance, _ = statistics[index]
                scale = norm.weight * torch.rsqrt(variance + norm.eps)
                normalised = (images - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
                images = convolution(F.relu(normalised))
            return torch.sigmoid(images).to(latents.dtype)
