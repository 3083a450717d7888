"""DiffAugment (Zhao et al. 2020, 2006.10738, section 3): real and fake images change at random before the critic sees
them, and gradients pass through the change to the generator. It is for datasets so small that the critic learns them by
heart.

The paper's images lie in [-1, 1], where a zero is mid-grey. In [0, 1] its brightness of up to 0.5 is 0.25 and what it
fills with zeros is 0.5. Images and draws are mirrored or not alike: no transformation prefers a side. Pixels may leave
[0, 1]. What a critic's penalty is taken at are the images that it sees.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

GREY = 0.5


def augment(images: Tensor, draws: Tensor, policies: Collection[str]) -> Tensor:
    """Images (n, C, H, W), each changed by its row of draws (n, AUGMENTATION_DRAWS), uniform in [0, 1).

    Args:
        policies: of POLICIES, whose order is that of application.
    """
    for name, change in POLICIES.items():
        if name in policies:
            images = change(images, draws)
    return images


def change_color(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness moves by [-0.25, 0.25], saturation is multiplied by [0, 2], then contrast by [0.5, 1.5]."""
    brightness, saturation, contrast = draws[:, :3, None, None, None].unbind(1)
    images = images + (brightness - 0.5) / 2
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


def translate(images: Tensor, draws: Tensor) -> Tensor:
    """Moved along each axis by whole pixels, at most an eighth of the side; what comes in is grey."""
    for axis, draw in ((2, draws[:, 3, None]), (3, draws[:, 4, None])):
        side = images.shape[axis]
        reach = int(side / 8 + 0.5)
        origin = torch.arange(side, device=images.device) - ((draw * (2 * reach + 1)).floor().long() - reach)
        along = [len(images), 1, side, 1] if axis == 2 else [len(images), 1, 1, side]
        moved = images.gather(axis, origin.clamp(0, side - 1).view(along).expand_as(images))
        images = moved.masked_fill(((origin < 0) | (origin >= side)).view(along), GREY)
    return images


def cut_out(images: Tensor, draws: Tensor) -> Tensor:
    """Grey in a square (of images that are none, a rectangle) of half the side, whose centre is anywhere in the
    image."""
    inside = []
    for axis, draw in ((2, draws[:, 5, None]), (3, draws[:, 6, None])):
        side = images.shape[axis]
        size = int(side / 2 + 0.5)
        first = (draw * (side + 1 - size % 2)).floor() - size // 2
        places = torch.arange(side, device=images.device)
        inside.append((places >= first) & (places < first + size))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], GREY)


POLICIES = {"color": change_color, "translation": translate, "cutout": cut_out}
"""By the paper's names."""
