"""What real Keras 3 makes of files and of the notebook's generator: `KERAS_BACKEND=torch ... keras_3.py FOLDER`.

Every `FOLDER/NAME.h5` is opened, and the images that it makes of the arrays 0, 1, ... of `NAME.npz` are written as
`NAME.npy`. Then generators are built as the notebook builds them and saved in FOLDER in every format, with arrays of
inputs and the images under the same names; and RMSprop takes two steps from 0, with the gradients 0.5 and -0.25,
written as `rmsprop.npy`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

CHANNELS, STRIDES = (13, 13, 6, 3, 1), (2, 2, 1, 1)
"""Of the notebook's generator at a tenth of its width."""


def inputs_of(model: Any, random: np.random.Generator) -> list[Any]:
    latents, *classes = (tensor.shape[1] for tensor in model.inputs)
    return [random.uniform(-1, 1, (2, latents)).astype(np.float32), *(np.eye(count)[:2] for count in classes)]


def images_of(model: Any, inputs: list[Any]) -> Any:
    return model(inputs if len(inputs) > 1 else inputs[0]).detach().numpy()


def body() -> list[Any]:
    stack = [layers.Dense(49 * CHANNELS[0]), layers.Reshape((7, 7, CHANNELS[0]))]
    for count, stride in zip(CHANNELS[1:], STRIDES, strict=True):
        stack += [layers.BatchNormalization(), layers.Activation("relu")]
        stack.append(layers.Conv2DTranspose(count, 5, strides=stride, padding="same"))
    return [*stack, layers.Activation("sigmoid")]


def functional(classes: int) -> Any:
    inputs = [keras.Input((6,), name="z_input"), *([keras.Input((classes,), name="class_labels")] if classes else [])]
    tensor = layers.Concatenate(axis=1)(inputs) if classes else inputs[0]
    for layer in body():
        tensor = layer(tensor)
    return keras.Model(inputs, tensor, name="generator")


def nested() -> Any:
    inputs = keras.Input((6,))
    return keras.Model(inputs, functional(0)(inputs))


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.h5")):
        model = keras.models.load_model(path, compile=False)
        np.save(path.with_suffix(".npy"), images_of(model, list(np.load(path.with_suffix(".npz")).values())))
    random = np.random.default_rng(0)
    keras.utils.set_random_seed(0)  # of the layers' first weights
    sequential = keras.Sequential([keras.Input((6,)), *body()])
    models = {"wgan": functional(0), "acgan": functional(10), "sequential": sequential, "nested": nested()}
    for name, model in models.items():
        for variable in model.weights:  # those that begin with 0 too, and variances remain positive
            value = keras.ops.convert_to_numpy(variable)
            change = random.normal(0, 0.3, value.shape) if variable.name in ("bias", "beta", "moving_mean") else 0
            variable.assign(value * random.uniform(0.5, 2, value.shape) + change)
        inputs = inputs_of(model, random)
        np.savez(folder / f"{name}.keras_3.npz", *inputs)
        np.save(folder / f"{name}.keras_3.npy", images_of(model, inputs))
        model.save(folder / f"{name}.keras_3.keras")
        model.save(folder / f"{name}.keras_3.h5")
        model.save_weights(folder / f"{name}.keras_3.weights.h5")
    weight = keras.Variable(np.zeros(1))
    optimizer = keras.optimizers.RMSprop(learning_rate=0.01, rho=0.9, epsilon=1.0)
    steps = []
    for gradient in (0.5, -0.25):
        optimizer.apply([keras.ops.convert_to_tensor([gradient])], [weight])
        steps.append(weight.numpy().item())
    np.save(folder / "rmsprop.npy", steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
