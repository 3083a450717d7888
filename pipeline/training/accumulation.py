"""What a step needs to take its batch in micro-batches, one after the other: memory for one of them, and the trajectory
of the whole batch to rounding.

The losses of micro-batches can be averaged, and so can the critic's gradients. The generator's batch norm is the
difficulty: it makes each image depend on the whole batch, over all ranks. `AccumulatingGenerator` measures the
statistics of the whole batch first, treats them as inputs of the micro-batches, and carries their gradients on at the
end.

Networks are not wrapped for data parallelism here: gradients are summed over the micro-batches, then averaged over the
ranks once an update (`average_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed.batch_norm import Statistics, update_moving_averages
from pipeline.distributed.collectives import Ranks
from pipeline.models.networks import Generator


def average_gradients(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Replaces the gradients of an optimiser's parameters by their means over the ranks, in one collective."""
    if ranks.world_size > 1:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        means = ranks.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, mean in zip(gradients, torch.split(means, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))


@dataclass
class AccumulatingGenerator:
    """Makes the images of a step as `StepGenerator` does, in micro-batches and with exact gradients.

    Args:
        generator: the state's, which is the reference's kind: the layers of a user's network are not known.
        micro_batches: their number, which divides a rank's rows of a batch.
        fakes_by_batch: see `StepGenerator`.
        autocast: the arithmetic of a forward pass, which here goes layer by layer.
    """

    generator: Generator
    micro_batches: int
    fakes_by_batch: bool
    ranks: Ranks
    autocast: Callable[[], AbstractContextManager[None]]

    def __call__(
        self, critic_latents: Tensor, critic_labels: Tensor, latents: Tensor, labels: Tensor
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Returns images (k, b, C, H, W) of the critic's k batches, detached, and `images_for_update` of the others."""
        generator = self.generator.train(self.fakes_by_batch)
        fakes = [self._make_fakes(z, y) for z, y in zip(critic_latents, critic_labels, strict=True)]
        generator.train()
        return torch.stack(fakes), self.images_for_update(latents, labels)

    def images_for_update(self, latents: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yields the images of one micro-batch after the other, attached to the generator's graph. The caller takes a
        backward pass through each before it asks for the next, and asks once more after the last.

        Let x be a batch norm's input, m and v its mean and biased variance over the N values of a channel in the whole
        batch. With m and v held as leaves, the backward passes of the micro-batches give the gradients of the
        parameters at fixed statistics, and dL/dm and dL/dv summed over the micro-batches. What is missing is how L
        depends on x through m and v:

            dL/dx += dL/dm * dm/dx + dL/dv * dv/dx,   dm/dx = 1 / N,   dv/dx = 2 (x - m) / N.

        So, from the last batch norm to the first, dL/dm and dL/dv are summed over the ranks and this term is sent
        backward from x, again micro-batch by micro-batch; on its way it adds to dL/dm and dL/dv of the earlier layers,
        which is why the order is last to first. All of it costs about three times the work of a plain backward pass.
        """
        statistics = [
            Statistics(mean.requires_grad_(), variance.requires_grad_(), count)
            for mean, variance, count in self._measure(latents, labels)
        ]
        pieces = [*zip(latents.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True)]
        for z, y in pieces:
            yield self._forward(z, y, statistics)
        for depth in reversed(range(len(statistics))):
            mean, variance, count = statistics[depth]
            assert mean.grad is not None
            assert variance.grad is not None
            for_mean, for_variance = (self.ranks.sum(torch.stack([mean.grad, variance.grad])) / count)[..., None, None]
            for z, y in pieces:
                values = self._forward(z, y, statistics, depth)
                deviation = values.detach() - mean.detach()[:, None, None]
                torch.autograd.backward(values, for_mean + 2 * for_variance * deviation)

    @torch.no_grad()
    def _make_fakes(self, latents: Tensor, labels: Tensor) -> Tensor:
        statistics = self._measure(latents, labels) if self.generator.training else None
        pieces = zip(latents.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True)
        return torch.cat([self._forward(z, y, statistics) for z, y in pieces])

    @torch.no_grad()
    def _measure(self, latents: Tensor, labels: Tensor) -> list[Statistics]:
        """Measures the statistics of the global batch before each batch norm and moves its moving averages.

        One batch norm after the other, since each sees what those before it have normalised. Sums are float64: the
        variance is a difference of two large ones.
        """
        statistics: list[Statistics] = []
        for depth, norm in enumerate(self.generator.norms):
            sums = torch.zeros((), dtype=torch.float64, device=latents.device)
            for z, y in zip(latents.chunk(self.micro_batches), labels.chunk(self.micro_batches), strict=True):
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

    def _forward(
        self, latents: Tensor, labels: Tensor, statistics: list[Statistics] | None, depth: int | None = None
    ) -> Tensor:
        """The generator's forward pass with `statistics` in the place of its batch norms' own (None: with those);
        `depth` stops before that batch norm and returns what it would normalise."""
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
                images = convolution(F.relu(_normalise(norm, images, statistics[index])))
            return torch.sigmoid(images).to(latents.dtype)


def _normalise(norm: nn.BatchNorm2d, images: Tensor, statistics: Statistics) -> Tensor:
    scale = norm.weight * torch.rsqrt(statistics.variance + norm.eps)
    centred = images - statistics.mean[:, None, None]
    normalised: Tensor = centred * scale[:, None, None] + norm.bias[:, None, None]
    return normalised
