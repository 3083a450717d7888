"""Keras's layers in NumPy, written out from their definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def keras_conv(images: Array, kernel: Array, bias: Array, stride: int) -> Array:
    """images [h, w, in], kernel [k, k, in, out] -> [ceil(h / s), ceil(w / s), out]; the odd padding row goes after."""
    size, k = images.shape[0], kernel.shape[0]
    out_size = -(-size // stride)
    before = max((out_size - 1) * stride + k - size, 0) // 2
    out = np.zeros((out_size, out_size, kernel.shape[3]))
    for row in range(out_size):
        for column in range(out_size):
            for i in range(k):
                for j in range(k):
                    y, x = row * stride + i - before, column * stride + j - before
                    if 0 <= y < size and 0 <= x < size:
                        out[row, column] += images[y, x] @ kernel[i, j]
    return out + bias


def keras_conv_transpose(images: Array, kernel: Array, bias: Array, stride: int) -> Array:
    """The transpose of `keras_conv` from an image of stride * h rows. kernel [k, k, out, in]."""
    rows, columns, k = *images.shape[:2], kernel.shape[0]
    before = max(k - stride, 0) // 2  # of (n - 1) * stride + k - n * stride rows, whatever n
    out = np.zeros((rows * stride, columns * stride, kernel.shape[2]))
    for row in range(rows):
        for column in range(columns):
            for i in range(k):
                for j in range(k):
                    y, x = row * stride + i - before, column * stride + j - before
                    if 0 <= y < out.shape[0] and 0 <= x < out.shape[1]:
                        out[y, x] += kernel[i, j] @ images[row, column]
    return out + bias


def keras_generator(stages: Sequence[Mapping[str, Array]], base: tuple[int, int, int], inputs: Array) -> Array:
    """The reference's generator: one latent, with classes followed by the one-hot class -> an image [h, w, channels].

    Args:
        stages: Variable -> array of each layer with weights, in the model's order, shapes and names as in Keras.
        base: Rows, columns and channels of the first feature maps.
    """
    dense, *rest = stages
    x = (inputs @ dense["kernel"] + dense["bias"]).reshape(base)
    strides = [2] * (len(rest) // 2 - 2) + [1, 1]
    for norm, convolution, stride in zip(rest[::2], rest[1::2], strides, strict=True):
        x = (x - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 1e-3) * norm["gamma"] + norm["beta"]
        x = keras_conv_transpose(np.maximum(x, 0), convolution["kernel"], convolution["bias"], stride)
    return np.asarray(1 / (1 + np.exp(-x)))
