"""Networks and objectives that no run can take, and some networks that look odd and are sound."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import NetworkConfig
from pipeline.models.objectives import Objective, PairedObjective

Shape = tuple[int, int, int]
number = 3
sound = Objective(torch.mean, torch.mean, torch.mean, classifies=True)
both_ways = Objective(torch.mean, torch.mean, torch.mean, classifies=True, projects=True)
between_classes = Objective(torch.mean, torch.mean, torch.mean, penalises=True, projects=True)
unreduced = Objective(torch.mean, lambda scores: 1 + scores, torch.mean)
of_numbers = Objective(torch.mean, torch.mean, lambda scores: scores.mean().item())  # type: ignore[arg-type, return-value]
of_one = PairedObjective(lambda scores: scores.mean(), lambda scores: scores.mean())  # type: ignore[arg-type, misc]


def nothing(network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
    pass


class Sound(nn.Module):
    """A generator of one layer."""

    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.layer = nn.Linear(network.latent_dim, math.prod(image_shape))

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        images: Tensor = torch.sigmoid(self.layer(latents)).view(-1, *self.image_shape)
        return images


class Picky(Sound):
    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__(network, image_shape, network.options["hidden"])


class Failing(Sound):
    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        raise RuntimeError("of two lines\nno such layer")


class Tall(Sound):
    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return super().forward(latents, labels).reshape(len(latents), 1, 16, -1)


class Noisy(Sound):
    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return super().forward(F.dropout(latents, 0.5), labels)


class Bright(Sound):
    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        images = super().forward(latents, labels)
        return 5 + images.round() + 0 * images


class Idle(Sound):
    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__(network, image_shape, num_classes)
        self.spare = nn.Parameter(torch.zeros(2))


class Frozen(Sound):
    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__(network, image_shape, num_classes)
        self.layer.bias.requires_grad_(False)


class Constant(Sound):
    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return super().forward(latents, labels).detach()


class Cumulative(Sound):
    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__(network, image_shape, num_classes)
        self.norm = nn.BatchNorm1d(network.latent_dim, momentum=None)


class Judge(nn.Module):
    """A sound critic, with batch norm."""

    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        size = math.prod(image_shape)
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size), nn.Linear(size, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.layers(images).squeeze(1), None


class ScoresAlone(Judge):
    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        scores: Tensor = self.layers(images).squeeze(1)
        return scores


class Column(Judge):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.layers(images), None


class Sorting(Judge):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        scores = self.layers(images)
        return scores.squeeze(1), scores.expand(-1, 3)


class Upright(nn.Module):
    """A generator without chance or classes: its first row is bright, then it gets dark. Its layers are such as the
    pipeline changes in the reference's networks, and its gain has no dimension and two names."""

    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.gain = self.same_gain = nn.Parameter(torch.tensor(1.0))
        self.up = nn.ConvTranspose2d(1, 1, 3, 2, padding=1, output_padding=1)
        self.same = nn.Conv2d(1, image_shape[0], 5, padding=2)
        self.image_shape = image_shape

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        _, height, width = self.image_shape
        maps = (latents[:, :1] * self.gain)[..., None, None].expand(-1, 1, height // 2, width // 2)
        images = torch.sigmoid(self.same(self.up(maps)))
        shade: Tensor = torch.linspace(1, 0, height, dtype=images.dtype).view(-1, 1)
        return images * shade


class FirstRow(nn.Module):
    """A critic that looks at the first row of an image alone."""

    def __init__(self, network: NetworkConfig, image_shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return images[:, :, 0].mean((1, 2)) * self.gain, None
