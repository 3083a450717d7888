"""Reads a generator that one of the reference's Keras notebooks saved with `generator.save("FILE.h5")` or, in Keras 3,
`generator.save("FILE.keras")`.

In Keras's HDF5 layout the group `model_weights` names its layers, in the model's order, in the attribute `layer_names`;
each layer is a group whose attribute `weight_names` lists its arrays; and the file's attribute `model_config` tells in
JSON what each layer does. `save_weights` writes the content of that group at the root, and no `model_config`.

A `.keras` file is a zip of such JSON, `config.json`, and of HDF5 in another layout, `model.weights.h5`, which Keras 3's
`save_weights` writes too: the group `layers` has a group for each layer, called by its class and its number among the
layers of that class, whose group `vars` has its arrays by number.

Only arrays and JSON are read: nothing is unpickled, and no code that a file may carry is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import h5py
import numpy as np
import torch
from torch import nn

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.models.networks import NORM_EPSILON, REFERENCE_DOUBLINGS, Generator, generator_layers, mirror, scaled

CHANNELS, STRIDES = generator_layers(REFERENCE_DOUBLINGS)
Layer = tuple[str, dict[str, Any]]
"""A layer of Keras: its name, and h5py datasets by variable (kernel, gamma, ...); or its class, and its settings."""
MISSING: Layer = ("", {})

LINEAR = {"kernel": "weight", "bias": "bias"}
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
MODULES = [("dense", LINEAR)]
"""The generator's modules in the order of Keras's layers with weights: name, and name here of each Keras variable, in
the order of Keras's arrays."""
GROUPS = ["dense"]
"""Keras 3's groups of these layers."""
LAYERS: list[Layer] = [("Dense", {"activation": "linear", "use_bias": True}), ("Reshape", {})]
"""The reference's generator after its inputs. A setting that an older Keras did not write has the value given here."""
for _i, _stride in enumerate(STRIDES):
    MODULES += [(f"norms.{_i}", NORM), (f"convolutions.{_i}", LINEAR)]
    GROUPS += [f"{_kind}_{_i}" if _i else _kind for _kind in ("batch_normalization", "conv2d_transpose")]
    LAYERS += [
        ("BatchNormalization", {"epsilon": NORM_EPSILON}),
        ("Activation", {"activation": "relu"}),
        (
            "Conv2DTranspose",
            {"activation": "linear", "use_bias": True, "strides": [_stride, _stride], "padding": "same"}
            | {"output_padding": None, "dilation_rate": [1, 1], "groups": 1, "data_format": "channels_last"},
        ),
    ]
LAYERS.append(("Activation", {"activation": "sigmoid"}))
NUM_LAYERS = (len(LAYERS), len(LAYERS) + 1)
"""Layers of a generator without classes; a Sequential model does not count its input."""

KERNEL_AXES = {nn.Linear: (1, 0), nn.ConvTranspose2d: (3, 2, 0, 1), nn.Conv2d: (2, 3, 0, 1)}
"""A module's kernel is Keras's with its axes in this order. Keras's are (in, out) and (rows, columns, out, in)."""


def load_keras(path: Path) -> Generator:
    """The generator of a file that Keras wrote, float32 and on the CPU. Its second input, if any, becomes the labels.

    Raises:
        UserError: the file is missing, damaged, or holds another network than the reference's generator.
    """
    try:
        with _opened(path) as (file, model):
            num_layers, weights = _weights(file)
            # Keras does not compress: a small file that declares more is made to fill the memory.
            if sum(array.nbytes for _, arrays in weights for array in arrays.values()) > path.stat().st_size:
                raise ValueError("its arrays declare more numbers than the file holds")
            if model is None:
                return _generator(weights, *_guessed_geometry(num_layers, weights))
            return _generator(weights, *_geometry(json.loads(model), weights))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a generator that Keras saved, e.g. wgan_mnist.h5") from None
    except (OSError, BadZipFile, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a generator of the reference's Keras notebooks ({reason})") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, str | bytes | None]]:
    """The file's HDF5 content, and what its model does in JSON, if it says so."""
    if not is_zipfile(path):
        with h5py.File(path, "r") as file:
            yield file, file.attrs.get("model_config")
        return
    with ZipFile(path) as archive:
        members = [archive.getinfo(name) for name in ("config.json", "model.weights.h5")]
        for member in members:
            if member.compress_type != ZIP_STORED:  # Keras does not; a small file could be made to fill the memory
                raise ValueError(f"{member.filename} in it is compressed; pack it again without compression")
        model, content = map(archive.read, members)
    with h5py.File(BytesIO(content), "r") as file:
        yield file, model


def _weights(file: Any) -> tuple[int, list[Layer]]:
    """The number of all layers, and those with weights, in the model's order."""
    root, layers = file.get("model_weights", file), file.get("layers")
    if "layer_names" in root.attrs:
        num_layers, weights = len(root.attrs["layer_names"]), _layers_by_name(root)
    elif isinstance(layers, h5py.Group):
        num_layers, weights = _layers_by_number(layers)
    else:
        raise ValueError("it does not name its layers; save it in Keras with generator.save('FILE.keras')")
    for (name, arrays), (_, names) in zip_longest(weights, MODULES, fillvalue=MISSING):
        if set(arrays) != set(names):
            there = f"layer {name!r} holds {', '.join(arrays) or 'nothing'}" if name else "the weights end"
            raise ValueError(f"{there} where {', '.join(names) or 'the end'} should come")
        for variable, array in arrays.items():
            if array.file != file or array.is_virtual or array.external:
                raise ValueError(f"array {name}/{variable} lies in another file")
            if array.dtype.kind != "f":
                raise ValueError(f"array {name}/{variable} is of type {array.dtype}, expected floating-point numbers")
    return num_layers, weights


def _layers_by_name(root: Any) -> list[Layer]:
    """The layers with weights, each array under its variable. A nested model is one group that holds all of its
    layers."""
    layers: dict[tuple[str, str], dict[str, Any]] = {}
    for layer in map(_text, root.attrs["layer_names"]):
        for name in map(_text, root[layer].attrs["weight_names"]):
            scope, _, variable = name.rpartition("/")
            layers.setdefault((layer, scope), {})[variable.removesuffix(":0")] = root[layer][name]
    return [(scope or layer, arrays) for (layer, scope), arrays in layers.items()]


def _layers_by_number(layers: Any) -> tuple[int, list[Layer]]:
    """The same of Keras 3's groups, and the number of all layers. A model that only calls another is that one."""
    for layer in layers.values():
        if "layers" in layer:
            return _layers_by_number(layer["layers"])
    arrays: dict[str, dict[str, Any]] = {
        name: dict(layer["vars"]) for name, layer in layers.items() if len(layer["vars"])
    }
    found: list[Layer] = []
    for group, (_, variables) in zip(GROUPS, MODULES, strict=True):
        names = dict(zip(map(str, range(len(variables))), variables, strict=True))
        found.append((group, {names.get(key, key): array for key, array in arrays.pop(group, {}).items()}))
    return len(layers), [*found, *arrays.items()]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _geometry(model: dict[str, Any], weights: list[Layer]) -> tuple[int, int, int]:
    """Rows and columns of the first feature maps and the number of classes (0: none), by `model_config`."""
    inputs, layers = _unwrapped(model)
    num_classes = 0
    if layers[0]["class_name"] == "Concatenate":
        joined = [name for name in _strings(layers.pop(0)["inbound_nodes"]) if name in inputs]
        if len(joined) != 2 or joined != list(inputs):
            raise ValueError(
                f"its inputs are {', '.join(inputs)} and it joins {', '.join(joined)}: expected the latents first and "
                "the one-hot classes second, in both"
            )
        name, shape = weights[0][0], weights[0][1]["kernel"].shape
        if sum(inputs.values()) != shape[0]:
            raise ValueError(f"layer {name!r} has a kernel of shape {shape} and inputs of {list(inputs.values())}")
        num_classes = inputs[joined[1]]
    found = [(layer["class_name"], layer["config"]) for layer in layers]
    for (kind, settings), (expected, values) in zip_longest(found, LAYERS, fillvalue=MISSING):
        there = f"{kind} {settings.get('name')!r}" if kind else "the end"
        if kind != expected:
            raise ValueError(f"{there} comes where {expected or 'the end'} should")
        for key, value in values.items():
            if settings.get(key, value) != value:
                raise ValueError(f"{there} has {key} {settings[key]!r}, expected {value!r}")
    height, width, channels = target = layers[1]["config"]["target_shape"]
    if not all(isinstance(side, int) and side > 0 for side in target):
        raise ValueError(f"{layers[1]['config'].get('name')!r} has target_shape {target}, expected positive integers")
    name, shape = weights[1][0], weights[1][1]["gamma"].shape
    if shape != (channels,):
        raise ValueError(f"layer {name!r} has a gamma of shape {shape}, expected ({channels},)")
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
    settings = [layer["config"] for layer in every if layer["class_name"] == "InputLayer"]
    inputs = {each["name"]: math.prod((each.get("batch_input_shape") or each["batch_shape"])[1:]) for each in settings}
    if len(inputs) > 1:
        inputs = {name: inputs[name] for name in _strings(config["input_layers"]) if name in inputs}
    return inputs, layers


def _strings(node: Any) -> Iterator[str]:
    """Every string in nested JSON lists and objects, in order: layer references differ between versions of Keras."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)


def _guessed_geometry(num_layers: int, weights: list[Layer]) -> tuple[int, int, int]:
    """`_geometry` of weights alone, whose images are taken for squares."""
    (name, dense), (_, norm) = weights[:2]
    units, channels = dense["bias"].size, norm["gamma"].size
    side = math.isqrt(units // max(channels, 1))
    if num_layers not in NUM_LAYERS:
        found = f"weights alone, of {num_layers} layers instead of {NUM_LAYERS[-1]}, do not tell latents from classes"
    elif side * side * channels != units:
        found = f"layer {name!r} makes {units} numbers, which are no square feature maps of {channels} channels"
    else:
        return side, side, 0
    raise ValueError(f"{found}; save the whole model with generator.save('FILE.keras')")


def _generator(weights: list[Layer], height: int, width: int, num_classes: int) -> Generator:
    every = [arrays for _, arrays in weights]
    latent_dim = every[0]["kernel"].shape[0] - num_classes
    config = NetworkConfig(latent_dim, _width([norm["gamma"].size for norm in every[1::2]]))
    with torch.device("meta"):  # takes no memory before the shapes are known to be the file's
        shape = every[-1]["bias"].size, height << REFERENCE_DOUBLINGS, width << REFERENCE_DOUBLINGS
        generator = Generator(config, shape, num_classes, REFERENCE_DOUBLINGS)
    state = generator.state_dict()
    for (layer, arrays), (path, names) in zip(weights, MODULES, strict=True):
        module = generator.get_submodule(path)
        for variable, array in arrays.items():
            name = f"{path}.{names[variable]}"
            axes = KERNEL_AXES[type(module)] if variable == "kernel" else (0,)
            shape = tuple(state[name].shape[axes.index(axis)] for axis in range(len(axes)))
            if array.shape != shape:
                raise ValueError(f"layer {layer!r} has a {variable} of shape {array.shape}, expected {shape}")
            tensor = torch.from_numpy(array[()].astype(np.float32)).permute(axes)
            # With stride 1 a transposed convolution is a convolution with the kernel flipped, and mirrored as it was.
            state[name] = tensor if isinstance(module, nn.Conv2d) else mirror(name, tensor, generator.base)
        if names is NORM:
            state[f"{path}.num_batches_tracked"] = torch.tensor(0)
    generator.to_empty(device="cpu").load_state_dict(state)
    return generator


def _width(channels: list[int]) -> float:
    """The shortest number that multiplies the reference's channel counts to these."""
    low = max((count - 0.5) / reference for count, reference in zip(channels, CHANNELS, strict=True))
    high = min((count + 0.5) / reference for count, reference in zip(channels, CHANNELS, strict=True))
    for digits in range(16):
        width = round((low + high) / 2, digits)
        if scaled(CHANNELS, width) == channels:
            return width
    raise ValueError(f"its channel counts {channels} are no multiple of the reference's {CHANNELS}")
