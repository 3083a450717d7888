"""Scores of generated images."""

TARGET = (
    "a run's folder, an exported generator (.safetensors, .h5, .keras, a Hugging Face folder), a folder of images, an "
    ".npz file, or the word train or test: that split of the real images"
)
