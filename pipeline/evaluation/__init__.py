"""Scores of generated images."""

from typing import Required, TypedDict


class Scores(TypedDict, total=False):
    """The content of a file of scores."""

    features: Required[dict[str, dict[str, object]]]
    """Feature space -> score -> value."""
    num_images: Required[int]
    step: int
    """The checkpoint's step; of images that have none, `target` names them."""
    target: str
    weights: str
    reference: str
    dataset: str
    seed: int
    critic: dict[str, object]
    gan_train: dict[str, object]


TARGET = (
    "a run's folder, an exported generator (.safetensors, .h5, .keras, a Hugging Face folder, "
    "hf://OWNER/NAME), a folder of images, an .npz file, or the word train or test: that split of the real images"
)
