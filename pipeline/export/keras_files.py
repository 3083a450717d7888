"""Generators in the files of the reference's Keras notebooks: read from .h5 and .keras, written to .h5.

In an .h5 file the group `model_weights` names its layers, in the model's order, in the attribute `layer_names`; each
layer is a group whose attribute `weight_names` lists its arrays; the file's attribute `model_config` holds what each
layer does, as JSON. `save_weights` writes the content of the group at the root, and no `model_config`.

A .keras file is a zip of such JSON, `config.json`, and of HDF5 in another layout, `model.weights.h5`, which Keras 3's
`save_weights` writes too: the group `layers` has a group for each layer, named by its class and its number in that
class, whose group `vars` has its arrays by number.

Only arrays and JSON are read: nothing is unpickled, and no code that a file may carry is run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile, is_zipfile

import h5py
import numpy as np
import torch
from torch import nn

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.models.networks import NORM_EPSILON, REFERENCE_DOUBLINGS, Generator, generator_layers, mirror, scaled
from pipeline.storage.files import replacing

CHANNELS, STRIDES = generator_layers(REFERENCE_DOUBLINGS)
LINEAR = {"kernel": "weight", "bias": "bias"}
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
VARIABLES = {"Dense": LINEAR, "Conv2DTranspose": LINEAR, "BatchNormalization": NORM}
"""For each class of layers with weights, Keras's variables in their order, and their names in our module."""
KERNEL_AXES = {nn.Linear: (1, 0), nn.ConvTranspose2d: (3, 2, 0, 1), nn.Conv2d: (2, 3, 0, 1)}
"""The axes of Keras's kernel, (in, out) or (rows, columns, out, in), in the order of our module's."""


class Layer(NamedTuple):
    """A layer of the reference's generator in Keras."""

    kind: str  # its class in Keras
    name: str  # its name in the first model of a session
    settings: dict[str, Any]  # what a file must say of it; what an older Keras did not write has the value given here
    module: str = ""  # the name of our module, if it has weights


def _layers() -> Iterator[Layer]:
    linear = {"activation": "linear", "use_bias": True}
    yield Layer("Dense", "dense", linear, "dense")
    yield Layer("Reshape", "reshape", {})
    for i, stride in enumerate(STRIDES):
        number = f"_{i}" if i else ""
        convolution = linear | {"strides": [stride, stride], "padding": "same", "data_format": "channels_last"}
        convolution |= {"output_padding": None, "dilation_rate": [1, 1]}
        yield Layer("BatchNormalization", f"batch_normalization{number}", {"epsilon": NORM_EPSILON}, f"norms.{i}")
        yield Layer("Activation", f"activation{number}", {"activation": "relu"})
        yield Layer("Conv2DTranspose", f"conv2d_transpose{number}", convolution, f"convolutions.{i}")
    yield Layer("Activation", f"activation_{len(STRIDES)}", {"activation": "sigmoid"})


LAYERS = tuple(_layers())
"""The layers after the inputs."""
WEIGHTED = tuple(layer for layer in LAYERS if layer.module)
Weights = list[tuple[str, dict[str, Any]]]
"""The layers with weights that a file holds: their names, and h5py datasets by variable (kernel, gamma, ...)."""
END: tuple[str, dict[str, Any]] = ("", {})

# -- reading -----------------------------------------------------------------------------------------------------------


def load_keras(path: Path) -> Generator:
    """Returns the generator of a file that Keras wrote, in float32 on the CPU. A second input becomes the labels.

    Raises:
        UserError: The file is missing, damaged, or holds another network than the reference's generator.
    """
    try:
        model, content = _unpack(path) if is_zipfile(path) else (None, path)
        with h5py.File(content, "r") as file:
            num_layers, weights = _read_weights(file)
            model = model or file.attrs.get("model_config")
            geometry = _geometry(json.loads(model)) if model else _guess_geometry(num_layers, weights)
            return _build(weights, *geometry)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a generator that Keras saved, e.g. wgan_mnist.h5") from None
    except (OSError, BadZipFile, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a generator of the reference's Keras notebooks ({reason})") from None


def _unpack(path: Path) -> tuple[bytes, BytesIO]:
    """Returns the model's JSON and the HDF5 content of a .keras file."""
    with ZipFile(path) as archive:
        if any(member.compress_type for member in archive.infolist()):  # Keras does not; it may stand for gigabytes
            raise ValueError("it is compressed; pack it again without compression")
        return archive.read("config.json"), BytesIO(archive.read("model.weights.h5"))


def _read_weights(file: Any) -> tuple[int, Weights]:
    """Returns the number of all layers, and name and arrays of those with weights, in the model's order."""
    root = file.get("model_weights", file)
    if "layer_names" in root.attrs:
        num_layers, weights = len(root.attrs["layer_names"]), _layers_by_name(root)
    elif "layers" in file:
        num_layers, weights = _layers_by_number(file["layers"])
    else:
        raise ValueError("it does not name its layers; save it in Keras with generator.save('FILE.keras')")
    expected: Weights = [("", VARIABLES[layer.kind]) for layer in WEIGHTED]
    for (name, arrays), (_, variables) in zip_longest(weights, expected, fillvalue=END):
        if set(arrays) != set(variables):
            there = f"layer {name!r} holds {', '.join(arrays) or 'nothing'}" if name else "the weights end"
            raise ValueError(f"{there} where {', '.join(variables) or 'the end'} should come")
        for variable, array in arrays.items():
            is_here = isinstance(array, h5py.Dataset) and array.file == file and not array.external
            if not is_here or array.dtype.kind != "f" or array.id.get_storage_size() != array.nbytes:
                raise ValueError(f"array {name}/{variable} is not one of floating-point numbers that this file holds")
    return num_layers, weights


def _layers_by_name(root: Any) -> Weights:
    """Returns the layers of Keras 2's layout. A nested model is one group that holds all of its layers."""
    layers: dict[tuple[str, str], dict[str, Any]] = {}
    for layer in root.attrs["layer_names"].astype(str):
        for name in root[layer].attrs["weight_names"].astype(str):
            scope, _, variable = name.rpartition("/")
            layers.setdefault((layer, scope), {})[variable.removesuffix(":0")] = root[layer][name]
    return [(scope or layer, arrays) for (layer, scope), arrays in layers.items()]


def _layers_by_number(layers: Any) -> tuple[int, Weights]:
    """Returns the number of all layers of Keras 3's layout, and those with weights. A model that only calls another
    stands for that one."""
    for layer in layers.values():
        if "layers" in layer:
            return _layers_by_number(layer["layers"])
    groups: dict[str, Any] = {name: dict(layer["vars"]) for name, layer in layers.items() if len(layer["vars"])}
    weights: Weights = []
    for layer in WEIGHTED:
        names, arrays = dict(zip("0123", VARIABLES[layer.kind], strict=False)), groups.pop(layer.name, {})
        weights.append((layer.name, {names.get(key, key): array for key, array in arrays.items()}))
    return len(layers), [*weights, *groups.items()]


def _geometry(model: dict[str, Any]) -> tuple[int, int, int]:
    """Returns rows and columns of the first feature maps and the number of classes (0: none) of a model in JSON, after
    comparing its layers with the reference's."""
    inputs, layers = _unwrap(model)
    num_classes = 0
    if layers[0]["class_name"] == "Concatenate":
        joined = _names_in(layers.pop(0)["inbound_nodes"], inputs)
        if len(joined) != 2 or joined != list(inputs):
            raise ValueError(
                f"its inputs are {', '.join(inputs)} and it joins {', '.join(joined)}: expected the latents first and "
                "the one-hot classes second, in both"
            )
        num_classes = inputs[joined[1]]
    described = [(layer["class_name"], layer["config"]) for layer in layers]
    expected = [(layer.kind, layer.settings) for layer in LAYERS]
    for (kind, settings), (expected_kind, values) in zip_longest(described, expected, fillvalue=END):
        there = f"{kind} {settings.get('name')!r}" if kind else "the end"
        if kind != expected_kind:
            raise ValueError(f"{there} comes where {expected_kind or 'the end'} should")
        for key, value in values.items():
            if settings.get(key, value) != value:
                raise ValueError(f"{there} has {key} {settings[key]!r}, expected {value!r}")
    height, width, _ = layers[1]["config"]["target_shape"]
    return height, width, num_classes


def _unwrap(model: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Returns the lengths of the model's inputs by name, in the order it is called with, and its other layers. A model
    that only calls another stands for that one."""
    config = model["config"]
    every = config if isinstance(config, list) else config["layers"]  # a list: Sequential before Keras 2.2.3
    layers = [layer for layer in every if layer["class_name"] != "InputLayer"]
    if len(layers) == 1 and layers[0]["class_name"] in {"Model", "Functional", "Sequential"}:
        return _unwrap(layers[0])
    settings = [layer["config"] for layer in every if layer["class_name"] == "InputLayer"]
    inputs = {item["name"]: (item.get("batch_input_shape") or item["batch_shape"])[-1] for item in settings}
    if len(inputs) > 1:
        inputs = {name: inputs[name] for name in _names_in(config["input_layers"], inputs)}
    return inputs, layers


def _names_in(node: Any, names: Collection[str]) -> list[str]:
    """Returns those of the names that nested JSON holds, in its order: each Keras nests references to layers in another
    way."""
    return [text for text in re.findall('"(.*?)"', json.dumps(node, ensure_ascii=False)) if text in names]


def _guess_geometry(num_layers: int, weights: Weights) -> tuple[int, int, int]:
    """Returns what `_geometry` does for weights alone, on the assumption that the images are square."""
    units, channels = weights[0][1]["bias"].size, weights[1][1]["gamma"].size
    side = math.isqrt(units // (channels or 1))
    # A Sequential model does not count its input.
    if num_layers not in (len(LAYERS), len(LAYERS) + 1) or side * side * channels != units:
        raise ValueError(
            "weights alone tell neither latents from classes nor the sides of images that are not square; save the "
            "whole model with generator.save('FILE.keras')"
        )
    return side, side, 0


def _build(weights: Weights, height: int, width: int, num_classes: int) -> Generator:
    every = [arrays for _, arrays in weights]
    latent_dim = every[0]["kernel"].shape[0] - num_classes
    config = NetworkConfig(latent_dim, _width([norm["gamma"].size for norm in every[1::2]]))
    with torch.device("meta"):  # takes no memory before the shapes are known to be the file's
        shape = every[-1]["bias"].size, height << REFERENCE_DOUBLINGS, width << REFERENCE_DOUBLINGS
        generator = Generator(config, shape, num_classes, REFERENCE_DOUBLINGS)
    state = generator.state_dict()
    for (name, arrays), layer in zip(weights, WEIGHTED, strict=True):
        for variable, array in arrays.items():
            key, axes, is_mirrored = _parameter(generator, layer, variable)
            shape = tuple(state[key].shape[axes.index(axis)] for axis in range(len(axes)))
            if array.shape != shape:
                raise ValueError(f"layer {name!r} has a {variable} of shape {array.shape}, expected {shape}")
            tensor = torch.from_numpy(array[()].astype(np.float32)).permute(axes)
            state[key] = mirror(key, tensor, generator.base) if is_mirrored else tensor
        if layer.kind == "BatchNormalization":
            state[f"{layer.module}.num_batches_tracked"] = torch.tensor(0)
    generator.to_empty(device="cpu").load_state_dict(state)
    return generator


def _parameter(generator: Generator, layer: Layer, variable: str) -> tuple[str, tuple[int, ...], bool]:
    """Returns the name of a variable of Keras in our generator, the order of Keras's axes there, and whether it is
    mirrored there: with stride 1 a transposed convolution is a convolution with the kernel flipped, which undoes it."""
    module = generator.get_submodule(layer.module)
    axes = KERNEL_AXES[type(module)] if variable == "kernel" else (0,)
    return f"{layer.module}.{VARIABLES[layer.kind][variable]}", axes, not isinstance(module, nn.Conv2d)


def _width(channels: list[int]) -> float:
    """Returns the shortest number that multiplies the reference's channel counts to these."""
    low = max((count - 0.5) / reference for count, reference in zip(channels, CHANNELS, strict=True))
    high = min((count + 0.5) / reference for count, reference in zip(channels, CHANNELS, strict=True))
    for digits in range(16):
        width = round((low + high) / 2, digits)
        if scaled(CHANNELS, width) == channels:
            return width
    raise ValueError(f"its channel counts {channels} are no multiple of the reference's {CHANNELS}")


# -- writing -----------------------------------------------------------------------------------------------------------

KERAS_VERSION = "2.2.4"
"""The version whose layout is written. Later ones read it, and give settings that are missing their defaults; a setting
that a version does not know makes it refuse the file."""


def save_keras(generator: nn.Module, path: Path) -> None:
    """Writes the whole model in float32, atomically, as `generator.save("FILE.h5")` does in the notebooks: their
    `-g FILE` and Keras's `load_model` read it.

    Its inputs are latents (n, latent_dim) and, with classes, one-hot classes (n, num_classes); its output is images
    (n, H, W, C) with pixels in [0, 1], not mirrored.

    Raises:
        UserError: It is another network than the notebooks'.
    """
    if not isinstance(generator, Generator) or generator.doublings != REFERENCE_DOUBLINGS:
        raise UserError(f"{path}: the Keras notebooks have no network like this; write .safetensors or .onnx")
    lengths = {"latents": generator.config.latent_dim, "classes": generator.num_classes}
    inputs = [
        Layer("InputLayer", name, {"batch_input_shape": [None, length], "dtype": "float32", "sparse": False})
        for name, length in lengths.items()
        if length
    ]
    stack = [*inputs, *([Layer("Concatenate", "concatenate", {"axis": -1})] if len(inputs) > 1 else []), *LAYERS]
    layers, sources = list[dict[str, Any]](), [layer.name for layer in inputs]
    for layer in stack:
        config = {"name": layer.name} | layer.settings | _settings(generator, layer)
        nodes = [] if layer in inputs else [[[source, 0, 0, {}] for source in sources]]
        layers.append({"class_name": layer.kind, "name": layer.name, "config": config, "inbound_nodes": nodes})
        sources = sources if layer in inputs else [layer.name]
    ends = {"input_layers": [[layer.name, 0, 0] for layer in inputs], "output_layers": [[sources[0], 0, 0]]}
    model = {"class_name": "Model", "config": {"name": "generator", "layers": layers, **ends}}
    state = generator.state_dict()
    content = BytesIO()  # HDF5 reports a full disk with errors of its own, and again when the file is closed
    with h5py.File(content, "w") as file:
        root = file.create_group("model_weights")
        for holder in (file, root):
            holder.attrs["keras_version"], holder.attrs["backend"] = KERAS_VERSION.encode(), b"tensorflow"
        file.attrs["model_config"] = json.dumps(model).encode()
        root.attrs["layer_names"] = [layer.name.encode() for layer in stack]
        for layer in stack:
            group, variables = root.create_group(layer.name), VARIABLES[layer.kind] if layer.module else ()
            # Keras writes an empty list of names as an empty array of numbers.
            group.attrs["weight_names"] = [f"{layer.name}/{name}:0".encode() for name in variables] or np.zeros(0)
            for variable in variables:
                key, axes, is_mirrored = _parameter(generator, layer, variable)
                tensor = state[key].float().cpu()
                tensor = mirror(key, tensor, generator.base) if is_mirrored else tensor
                group[f"{layer.name}/{variable}:0"] = tensor.permute(*np.argsort(axes).tolist()).numpy()
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _settings(generator: Generator, layer: Layer) -> dict[str, Any]:
    """Returns what Keras says of the layer's size."""
    match layer.kind:
        case "Dense":
            return {"units": generator.dense.out_features}
        case "Reshape":
            return {"target_shape": [*generator.base, generator.norms[0].num_features]}
        case "Conv2DTranspose":
            module: Any = generator.get_submodule(layer.module)
            return {"filters": module.out_channels, "kernel_size": list(module.kernel_size)}
    return {}
