"""DiffAugment (Zhao et al. 2020, 2006.10738, section 3): real and fake images are changed at random before the critic
sees them, and gradients pass through the change to the generator. It is for datasets so small that the critic memorises
them.

The paper's images lie in [-1, 1], where zero is mid-grey. In [0, 1] its brightness of up to 0.5 becomes 0.25, and what
it fills with zeros becomes 0.5. No transformation prefers a side, so mirrored images are changed as others are. Pixels
may leave [0, 1]. A critic's penalty is taken at the images that it sees, the changed ones.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

GREY = 0.5


def augment(images: Tensor, draws: Tensor, policies: Collection[str]) -> Tensor:
    """Changes each of the images (..., C, H, W) by its draws (..., AUGMENTATION_DRAWS), uniform in [0, 1).

    Args:
        policies: names of POLICIES. They are applied in the order of POLICIES.
    """
    changed, draws = images.flatten(0, -4), draws.flatten(0, -2)
    for name, change in POLICIES.items():
        if name in policies:
            changed = change(changed, draws)
    return changed.reshape(images.shape)


def change_color(images: Tensor, draws: Tensor) -> Tensor:
    """Adds [-0.25, 0.25] to the brightness, multiplies the saturation by [0, 2], then the contrast by [0.5, 1.5]."""
    brightness, saturation, contrast = draws[:, :3, None, None, None].unbind(1)
    images = images + (brightness - 0.5) / 2
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


def translate(images: Tensor, draws: Tensor) -> Tensor:
    """Moves images along each axis by whole pixels, at most an eighth of the side, and fills with grey."""
    for axis, draw in ((2, draws[:, 3, None]), (3, draws[:, 4, None])):
        side = images.shape[axis]
        reach = int(side / 8 + 0.5)
        origin = torch.arange(side, device=images.device) - ((draw * (2 * reach + 1)).floor().long() - reach)
        along = [len(images), 1, side, 1] if axis == 2 else [len(images), 1, 1, side]
        moved = images.gather(axis, origin.clamp(0, side - 1).view(along).expand_as(images))
        images = moved.masked_fill(((origin < 0) | (origin >= side)).view(along), GREY)
    return images


def cut_out(images: Tensor, draws: Tensor) -> Tensor:
    """Fills a rectangle of half of each side, whose centre is anywhere in the image, with grey."""
    inside = []
    for axis, draw in ((2, draws[:, 5, None]), (3, draws[:, 6, None])):
        side = images.shape[axis]
        size = int(side / 2 + 0.5)
        first = (draw * (side + 1 - size % 2)).floor() - size // 2
        places = torch.arange(side, device=images.device)
        inside.append((places >= first) & (places < first + size))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], GREY)


POLICIES = {"color": change_color, "translation": translate, "cutout": cut_out}
"""The transformations by the paper's names, in the order in which they are applied."""
