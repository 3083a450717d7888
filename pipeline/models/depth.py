"""How deep the reference's networks are for images of a size.

The notebook's generator doubles maps of 7 x 7 twice, and its critic halves images of 28 x 28 three times. From 32
pixels a side on there are as many doublings as leave a base of 4 to 8, and the critic halves as often, to maps of that
size. What comes before the notebook's layers in the generator, and behind them in the critic, has twice the channels of
its neighbour, as in DCGAN (Radford et al. 2016, 1511.06434), and at most 512.
"""

from __future__ import annotations

from pipeline.errors import UserError

GENERATOR_CHANNELS = (512, 512, 512, 256, 128, 128, 64, 32)
"""Before each layer of the deepest generator. One of d doublings has the last d + 2: in the notebook 128 to 32."""
CRITIC_CHANNELS = (32, 64, 128, 256, 512, 512, 512)
"""After each convolution of the deepest critic. One that halves d times has the first d + 1."""
REFERENCE_DOUBLINGS, MOST_DOUBLINGS = 2, 6
REFERENCE_HALVINGS = 3
LARGEST_BASE, LARGEST_SIDE = 8, 256
SIDES = (4, 8, 12, *(base << count for count in range(2, 6) for base in range(4, 8)), LARGEST_SIDE)
"""Of square images that there are networks for, ascending. Those under 16 are doubled twice, from a smaller base."""


def doublings_of(height: int, width: int) -> int:
    """As many as leave a base of at least 4 pixels a side; never less than the notebook has."""
    return min(MOST_DOUBLINGS, max(REFERENCE_DOUBLINGS, (min(height, width) // 4).bit_length() - 1))


def halvings_of(height: int, width: int) -> int:
    return max(REFERENCE_HALVINGS, doublings_of(height, width))


def check_sides(height: int, width: int) -> None:
    """Raises UserError for images that the doublings do not reach, with the nearest sides that they do."""
    factor = 2 ** doublings_of(height, width)
    if any(side % factor or side > min(LARGEST_BASE * factor, LARGEST_SIDE) for side in (height, width)):
        smaller = [side for side in SIDES if side <= min(height, width)][-1:]
        larger = [side for side in SIDES if side >= max(height, width)][:1]
        sizes = " or ".join(f"--size {side}" for side in smaller + larger)
        raise UserError(
            f"images of {height} x {width}: the generator doubles a base of 4 to {LARGEST_BASE} pixels a side, up to "
            f"{LARGEST_SIDE}, which does not reach them (prepare the dataset with {sizes})"
        )


def generator_layers(doublings: int) -> tuple[list[int], list[int]]:
    """Channels before each of its convolutions at width 1, and their strides.

    Raises:
        ValueError: there is no such generator.
    """
    if doublings not in range(REFERENCE_DOUBLINGS, MOST_DOUBLINGS + 1):
        raise ValueError(f"a generator doubles {REFERENCE_DOUBLINGS} to {MOST_DOUBLINGS} times, not {doublings}")
    return list(GENERATOR_CHANNELS[-2 - doublings :]), [2] * doublings + [1, 1]


def critic_layers(halvings: int) -> tuple[list[int], list[int]]:
    """Channels after each of its convolutions at width 1, and their strides."""
    return list(CRITIC_CHANNELS[: halvings + 1]), [2] * halvings + [1]
