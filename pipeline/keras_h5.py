"""Reads a generator that one of the reference's Keras notebooks saved with `generator.save("FILE.h5")`.

In Keras's HDF5 layout the group `model_weights` names its layers, in the model's order, in the attribute `layer_names`;
each layer is a group whose attribute `weight_names` lists its arrays; and the file's attribute `model_config` tells in
JSON what each layer does. `save_weights` writes the content of that group at the root, and no `model_config`. Only
arrays and JSON are read: nothing is unpickled, and no code that a file may carry is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from pipeline.config import NetworkConfig
from pipeline.models.cpu_kernels import KERNEL
from pipeline.errors import UserError
from pipeline.models.networks import GENERATOR_CHANNELS, NORM_EPSILON, Generator, scaled

STRIDES = (2, 2, 1, 1)
LINEAR = ("kernel", "bias")
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
NUM_LAYERS = (15, 16)
"""Layers of a generator without classes; a Sequential model does not count its input."""

LINEAR_CONFIG = {"activation": "linear", "use_bias": True}
LAYERS = [
    ("Dense", LINEAR_CONFIG),
    ("Reshape", {}),
    *(
        layer
        for stride in STRIDES
        for layer in (
            ("BatchNormalization", {"epsilon": NORM_EPSILON}),
            ("Activation", {"activation": "relu"}),
            (
                "Conv2DTranspose",
                LINEAR_CONFIG
                | {"strides": [stride, stride], "padding": "same", "output_padding": None}
                | {"dilation_rate": [1, 1], "groups": 1, "data_format": "channels_last"},
            ),
        )
    ),
    ("Activation", {"activation": "sigmoid"}),
]
"""The reference's generator after its inputs. A setting that an older Keras did not write has the value given here."""

Stage = tuple[str, dict[str, Any]]
"""A layer with weights: its name, and its h5py datasets by variable (kernel, gamma, ...)."""


def load_keras(path: Path) -> Generator:
    """The generator of a Keras HDF5 file, float32 and on the CPU. Its second input, if any, becomes the labels.

    Raises:
        UserError: the file is missing, damaged, or holds another network than the reference's generator.
    """
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            if "layer_names" not in root.attrs:
                raise ValueError("it does not name its layers; save it in Keras with generator.save('FILE.h5')")
            stages = _stages(root)
            # Keras does not compress: a small file that declares more is made to fill the memory.
            if sum(array.nbytes for _, arrays in stages for array in arrays.values()) > path.stat().st_size:
                raise ValueError("its arrays declare more numbers than the file holds")
            if "model_config" in file.attrs:
                return _generator(stages, *_geometry(json.loads(file.attrs["model_config"]), stages))
            return _generator(stages, *_guessed_geometry(len(root.attrs["layer_names"]), stages))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a generator that Keras saved, e.g. wgan_mnist.h5") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a generator of the reference's Keras notebooks ({reason})") from None


def _stages(root: Any) -> list[Stage]:
    """The layers with weights, in the model's order. A nested model is one group that holds all of its layers."""
    stages: dict[tuple[str, str], dict[str, Any]] = {}
    for layer in map(_text, root.attrs["layer_names"]):
        for name in map(_text, root[layer].attrs["weight_names"]):
            array = root[layer][name]
            if array.file != root.file or array.is_virtual or array.external:
                raise ValueError(f"array {name!r} lies in another file")
            if array.dtype.kind != "f":
                raise ValueError(f"array {name!r} is of type {array.dtype}, expected floating-point numbers")
            scope, _, variable = name.rpartition("/")
            stages.setdefault((layer, scope), {})[variable.removesuffix(":0")] = array
    found = [(scope or layer, arrays) for (layer, scope), arrays in stages.items()]
    for stage, variables in zip_longest(found, [LINEAR, *(NORM, LINEAR) * len(STRIDES)]):
        if stage is None or variables is None or set(stage[1]) != set(variables):
            there = f"layer {stage[0]!r} holds {', '.join(stage[1])}" if stage else "the weights end"
            raise ValueError(f"{there} where {', '.join(variables) if variables else 'the end'} should come")
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _geometry(model: dict[str, Any], stages: list[Stage]) -> tuple[int, int, int]:
    """Rows and columns of the first feature maps and the number of classes (0: none), by `model_config`."""
    inputs, layers = _unwrapped(model)
    num_classes = 0
    if layers[0]["class_name"] == "Concatenate":
        joined = [name for name in _strings(layers[0]["inbound_nodes"]) if name in inputs]
        if len(joined) != 2 or joined != list(inputs):
            raise ValueError(
                f"its inputs are {', '.join(inputs)} and it joins {', '.join(joined)}: expected the latents first and "
                "the one-hot classes second, in both"
            )
        name, dense = stages[0]
        if sum(inputs.values()) != dense["kernel"].shape[0]:
            raise ValueError(
                f"layer {name!r} has a kernel of shape {dense['kernel'].shape} and inputs of {list(inputs.values())}"
            )
        num_classes = inputs[joined[1]]
        layers = layers[1:]
    for layer, expected in zip_longest(layers, LAYERS):
        there = f"{layer['class_name']} {layer['config'].get('name')!r}" if layer else "the end"
        if layer is None or expected is None or layer["class_name"] != expected[0]:
            raise ValueError(f"{there} comes where {expected[0] if expected else 'the end'} should")
        for key, value in expected[1].items():
            if layer["config"].get(key, value) != value:
                raise ValueError(f"{there} has {key} {layer['config'][key]!r}, expected {value!r}")
    height, width, channels = layers[1]["config"]["target_shape"]
    name, norm = stages[1]
    if norm["gamma"].shape != (channels,):
        raise ValueError(f"layer {name!r} has a gamma of shape {norm['gamma'].shape}, expected ({channels},)")
    return height, width, num_classes


def _unwrapped(model: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Name -> length of the model's inputs, in the order it is called with, and its other layers.

    A model that only calls another is that one.
    """
    config = model["config"]
    every = config if isinstance(config, list) else config["layers"]  # a list: Sequential before Keras 2.2.3
    layers = [layer for layer in every if layer["class_name"] != "InputLayer"]
    if len(layers) == 1 and layers[0]["class_name"] in {"Model", "Functional", "Sequential"}:
        return _unwrapped(layers[0])
    shapes = {
        layer["config"]["name"]: layer["config"].get("batch_input_shape") or layer["config"]["batch_shape"]
        for layer in every
        if layer["class_name"] == "InputLayer"
    }
    order = list(shapes) if len(shapes) < 2 else [name for name in _strings(config["input_layers"]) if name in shapes]
    return {name: math.prod(shapes[name][1:]) for name in order}, layers


def _strings(node: Any) -> Iterator[str]:
    """Every string in nested JSON lists and objects, in order: layer references differ between versions of Keras."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)


def _guessed_geometry(num_layers: int, stages: list[Stage]) -> tuple[int, int, int]:
    """`_geometry` of weights alone, whose images are taken for squares."""
    if num_layers not in NUM_LAYERS:
        raise ValueError(
            f"weights alone, of {num_layers} layers instead of {NUM_LAYERS[-1]}, do not tell latents from classes; "
            "save the whole model with generator.save('FILE.h5')"
        )
    units, channels = stages[0][1]["bias"].size, stages[1][1]["gamma"].size
    side = math.isqrt(units // max(channels, 1))
    if side * side * channels != units:
        raise ValueError(
            f"layer {stages[0][0]!r} makes {units} numbers, which are no square feature maps of {channels} channels; "
            "save the whole model with generator.save('FILE.h5')"
        )
    return side, side, 0


def _generator(stages: list[Stage], height: int, width: int, num_classes: int) -> Generator:
    dense, norms, convolutions = stages[0], stages[1::2], stages[2::2]
    channels = [norms[0][1]["gamma"].size, *(arrays["bias"].size for _, arrays in convolutions)]
    units = height * width * channels[0]
    _check(dense, {"kernel": (dense[1]["kernel"].shape[0], units), "bias": (units,)})
    for before, after, count, out in zip(norms, convolutions, channels[:-1], channels[1:], strict=True):
        _check(before, dict.fromkeys(NORM, (count,)))
        _check(after, {"kernel": (KERNEL, KERNEL, out, count), "bias": (out,)})

    config = NetworkConfig(latent_dim=dense[1]["kernel"].shape[0] - num_classes, width=_width(channels[:-1]))
    generator = Generator(config, (channels[-1], 4 * height, 4 * width), num_classes)
    state = {"dense.weight": _tensor(dense[1]["kernel"]).T, "dense.bias": _tensor(dense[1]["bias"])}
    for i, ((_, norm), (_, convolution)) in enumerate(zip(norms, convolutions, strict=True)):
        state |= {f"norms.{i}.{ours}": _tensor(norm[theirs]) for theirs, ours in NORM.items()}
        kernel = _tensor(convolution["kernel"])  # (rows, columns, out, in)
        # The networks' transposed convolutions of stride 1 are convolutions with the kernel flipped.
        kernel = kernel.permute(3, 2, 0, 1) if STRIDES[i] == 2 else kernel.permute(2, 3, 0, 1).flip(2, 3)
        state |= {f"convolutions.{i}.weight": kernel, f"convolutions.{i}.bias": _tensor(convolution["bias"])}
    generator.load_state_dict(generator.state_dict() | state)
    return generator


def _check(stage: Stage, shapes: dict[str, tuple[int, ...]]) -> None:
    name, arrays = stage
    for variable, shape in shapes.items():
        if arrays[variable].shape != shape:
            raise ValueError(f"layer {name!r} has a {variable} of shape {arrays[variable].shape}, expected {shape}")


def _width(channels: list[int]) -> float:
    """The shortest number that multiplies the reference's channel counts to these."""
    low = max((count - 0.5) / reference for count, reference in zip(channels, GENERATOR_CHANNELS, strict=True))
    high = min((count + 0.5) / reference for count, reference in zip(channels, GENERATOR_CHANNELS, strict=True))
    for digits in range(16):
        width = round((low + high) / 2, digits)
        if scaled(GENERATOR_CHANNELS, width) == channels:
            return width
    raise ValueError(f"its channel counts {channels} are no multiple of the reference's {list(GENERATOR_CHANNELS)}")


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array[()].astype(np.float32))
