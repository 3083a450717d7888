"""A step whose rank takes its slice of a batch in micro-batches, one after the other: memory for one of them, the
trajectory of the whole slice to rounding, batch norm included.

The networks are not wrapped for data parallelism here: gradients are summed over the micro-batches first, and shared
among the ranks once an update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed.batch_norm import Statistics, update_moving_averages
from pipeline.distributed.collectives import Ranks
from pipeline.models.networks import Generator
from pipeline.models.objectives import with_class_loss
from pipeline.models.spectral_norm import follow_update
from pipeline.training.inputs import Images, StepInputs
from pipeline.training.state import clip_
from pipeline.training.step import Step


@dataclass
class MicroBatchStep(Step):
    """The same updates in `count` micro-batches, which divides a rank's slice."""

    count: int = 1
    ranks: Ranks = Ranks()
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    """The arithmetic of a generator's forward pass, which is taken apart here."""

    def _slices(self, num_images: int) -> list[slice]:
        size = num_images // self.count
        return [slice(start, start + size) for start in range(0, num_images, size)]

    @property
    def _generator(self) -> Generator:
        generator = self.state.generator
        assert isinstance(generator, Generator), "others are refused: nobody knows their layers"
        return generator

    def make_images(self, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Images for the critic's updates, and the generator's latents: its images are made in its update."""
        generator = self._generator.train(self.training.critic_fakes == "batch")
        fakes = self._make_fakes(generator, inputs.critic_latents, inputs.critic_labels)
        generator.train()
        return inputs.real.to(fakes.dtype) / 255, fakes, inputs.generator_latents

    def as_seen(self, images: Tensor, rows: slice) -> Tensor:
        """The generator's images of these rows of the slice, as the critic sees them in its update."""
        return images

    def update_critic(self, real: Images, fake: Images, mix: Tensor | None) -> Tensor:
        optimizer, slices = self.state.critic_optimizer, self._slices(len(real.labels))
        if self.training.critic_updates == "joint":
            losses = []
            optimizer.zero_grad()
            for rows in slices:
                real_part, fake_part = (Images(images.pixels[rows], images.labels[rows]) for images in (real, fake))
                loss, both = self.joint_loss(real_part, fake_part, None if mix is None else mix[rows])
                self._backward(loss)
                losses.append(both)
            self._finish(optimizer)
        else:
            losses = [real.pixels.new_zeros(2) for _ in slices]  # of the run's precision
            for side, loss_of in enumerate((self.objective.real_loss, self.objective.fake_loss)):
                if side and self.training.spectral_norm:
                    follow_update(self.state.critic)  # by the first loss: it is not clipped yet
                optimizer.zero_grad()
                for rows, found in zip(slices, losses, strict=True):
                    scores, logits = self.critic((real, fake)[side].pixels[rows])
                    loss = with_class_loss(loss_of(scores), logits, (real, fake)[side].labels[rows])
                    self._backward(loss)
                    found[side] = loss.detach()
                self._finish(optimizer)
        clip_(self.state.critic, self.training.clip_value)
        if self.training.spectral_norm:
            follow_update(self.state.critic)
        return torch.stack(losses).mean(0)

    def update_generator(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Batch norm makes an image depend on its whole batch, so the losses of micro-batches can't simply be averaged.
        Its statistics are taken as inputs at first: a backward pass over each micro-batch gives the gradients of the
        parameters and of the statistics. Then, from the last batch norm to the first, those of the statistics are
        carried on to what they were taken from: d mean / d x = 1 / N and d variance / d x = 2 (x - mean) / N. It costs
        about three times the work of one micro-batch.
        """
        critic, generator, slices = self.state.critic, self._generator, self._slices(len(latents))
        critic.requires_grad_(False)
        self.state.generator_optimizer.zero_grad()
        statistics = [
            Statistics(mean.requires_grad_(), variance.requires_grad_(), count)
            for mean, variance, count in self._measure_statistics(generator, latents, labels)
        ]
        losses = []
        for rows in slices:
            images = self._generate(generator, latents[rows], labels[rows], statistics)
            scores, logits = critic(self.as_seen(images, rows))
            loss = with_class_loss(self.objective.generator_loss(scores), logits, labels[rows])
            self._backward(loss)
            losses.append(loss.detach())
        for depth in reversed(range(len(statistics))):
            mean, variance, count = statistics[depth]
            assert mean.grad is not None
            assert variance.grad is not None
            for_mean, for_variance = (self.ranks.sum(torch.stack([mean.grad, variance.grad])) / count)[..., None, None]
            for rows in slices:
                values = self._generate(generator, latents[rows], labels[rows], statistics, depth)
                deviation = values.detach() - mean.detach()[:, None, None]
                torch.autograd.backward(values, for_mean + 2 * for_variance * deviation)
        self._finish(self.state.generator_optimizer)
        critic.requires_grad_(True)
        return torch.stack(losses).mean()

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self.state.scaler.scale(loss / self.count))

    def _finish(self, optimizer: torch.optim.Optimizer) -> None:
        """Averages the gradients over the ranks, and updates."""
        if self.ranks.world_size > 1:
            gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
            means = self.ranks.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            for gradient, mean in zip(gradients, torch.split(means, [each.numel() for each in gradients]), strict=True):
                gradient.copy_(mean.view(gradient.shape))
        self.state.scaler.step(optimizer)
        self.state.scaler.update()

    @torch.no_grad()
    def _make_fakes(self, generator: Generator, latents: Tensor, labels: Tensor) -> Tensor:
        batches = []
        for z, y in zip(latents, labels, strict=True):
            statistics = self._measure_statistics(generator, z, y) if generator.training else None
            slices = self._slices(len(z))
            batches.append(torch.cat([self._generate(generator, z[rows], y[rows], statistics) for rows in slices]))
        return torch.stack(batches)

    @torch.no_grad()
    def _measure_statistics(self, generator: Generator, latents: Tensor, labels: Tensor) -> list[Statistics]:
        """Statistics of the global batch before each batch norm, and their update of the moving averages.

        One batch norm after the other: each is measured with the statistics of those before it in place.
        """
        statistics: list[Statistics] = []
        for depth, norm in enumerate(generator.norms):
            sums = torch.zeros((), dtype=torch.float64, device=latents.device)
            for rows in self._slices(len(latents)):
                values = self._generate(generator, latents[rows], labels[rows], statistics, depth).double()
                moments = [values, values.square(), torch.ones_like(values)]
                sums = sums + torch.stack([moment.sum((0, 2, 3)) for moment in moments])
            total, squares, count = self.ranks.sum(sums)
            mean = total / count
            found = (mean, squares / count - mean.square(), count)
            statistics.append(Statistics(*(value.to(latents.dtype) for value in found)))
            assert isinstance(norm, nn.BatchNorm2d)
            update_moving_averages(norm, statistics[-1])
        return statistics

    def _generate(
        self,
        generator: Generator,
        latents: Tensor,
        labels: Tensor,
        statistics: list[Statistics] | None,
        depth: int | None = None,
    ) -> Tensor:
        """The generator's forward pass with these statistics in the place of its batch norms' own; `depth` stops before
        that batch norm and returns what it would normalise."""
        if statistics is None:
            images: Tensor = generator(latents, labels)
            return images
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
