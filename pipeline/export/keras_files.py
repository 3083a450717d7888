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
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

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
    number: int  # its number among the layers of its class, from 0 on
    settings: dict[str, Any]  # what a file must say of it; what an older Keras did not write has the value given here
    module: str = ""  # the name of our module, if it has weights

    @property
    def name(self) -> str:
        """The name that Keras gives it: batch_normalization for the first of its class, then batch_normalization_1."""
        snake_case = re.sub("(?<!^)(?=[A-Z][a-z])", "_", self.kind).lower()
        return f"{snake_case}_{self.number}" if self.number else snake_case


def _layers() -> Iterator[Layer]:
    linear = {"activation": "linear", "use_bias": True}
    yield Layer("Dense", 0, linear, "dense")
    yield Layer("Reshape", 0, {})
    for i, stride in enumerate(STRIDES):
        convolution = linear | {"strides": [stride, stride], "padding": "same", "data_format": "channels_last"}
        convolution |= {"output_padding": None, "dilation_rate": [1, 1], "groups": 1}
        yield Layer("BatchNormalization", i, {"epsilon": NORM_EPSILON}, f"norms.{i}")
        yield Layer("Activation", i, {"activation": "relu"})
        yield Layer("Conv2DTranspose", i, convolution, f"convolutions.{i}")
    yield Layer("Activation", len(STRIDES), {"activation": "sigmoid"})


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
        with _open(path) as (file, model):
            num_layers, weights = _read_weights(file)
            # Keras does not compress: a small file that declares more was made to fill the memory.
            if sum(array.nbytes for _, arrays in weights for array in arrays.values()) > path.stat().st_size:
                raise ValueError("its arrays declare more numbers than the file holds")
            geometry = _guess_geometry(num_layers, weights) if model is None else _geometry(json.loads(model), weights)
            return _build(weights, *geometry)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a generator that Keras saved, e.g. wgan_mnist.h5") from None
    except (OSError, BadZipFile, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a generator of the reference's Keras notebooks ({reason})") from None


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, str | bytes | None]]:
    """Yields the file's HDF5 content, and the model's JSON if there is one."""
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


def _read_weights(file: Any) -> tuple[int, Weights]:
    """Returns the number of all layers, and name and arrays of those with weights, in the model's order."""
    root, layers = file.get("model_weights", file), file.get("layers")
    if "layer_names" in root.attrs:
        num_layers, weights = len(root.attrs["layer_names"]), _layers_by_name(root)
    elif isinstance(layers, h5py.Group):
        num_layers, weights = _layers_by_number(layers)
    else:
        raise ValueError("it does not name its layers; save it in Keras with generator.save('FILE.keras')")
    expected: Weights = [(layer.module, VARIABLES[layer.kind]) for layer in WEIGHTED]
    for (name, arrays), (_, variables) in zip_longest(weights, expected, fillvalue=END):
        if set(arrays) != set(variables):
            there = f"layer {name!r} holds {', '.join(arrays) or 'nothing'}" if name else "the weights end"
            raise ValueError(f"{there} where {', '.join(variables) or 'the end'} should come")
        for variable, array in arrays.items():
            if array.file != file or array.is_virtual or array.external:
                raise ValueError(f"array {name}/{variable} lies in another file")
            if array.dtype.kind != "f":
                raise ValueError(f"array {name}/{variable} is of type {array.dtype}, expected floating-point numbers")
    return num_layers, weights


def _layers_by_name(root: Any) -> Weights:
    """Returns the layers of Keras 2's layout. A nested model is one group that holds all of its layers."""
    layers: dict[tuple[str, str], dict[str, Any]] = {}
    for layer in map(_text, root.attrs["layer_names"]):
        for name in map(_text, root[layer].attrs["weight_names"]):
            scope, _, variable = name.rpartition("/")
            layers.setdefault((layer, scope), {})[variable.removesuffix(":0")] = root[layer][name]
    return [(scope or layer, arrays) for (layer, scope), arrays in layers.items()]


def _layers_by_number(layers: Any) -> tuple[int, Weights]:
    """Returns the number of all layers of Keras 3's layout, and those with weights. A model that only calls another
    stands for that one."""
    for layer in layers.values():
        if "layers" in layer:
            return _layers_by_number(layer["layers"])
    groups: dict[str, dict[str, Any]] = {
        name: dict(layer["vars"]) for name, layer in layers.items() if len(layer["vars"])
    }
    weights: Weights = []
    for layer in WEIGHTED:
        names = {str(number): variable for number, variable in enumerate(VARIABLES[layer.kind])}
        weights.append((layer.name, {names.get(key, key): array for key, array in groups.pop(layer.name, {}).items()}))
    return len(layers), [*weights, *groups.items()]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _geometry(model: dict[str, Any], weights: Weights) -> tuple[int, int, int]:
    """Returns rows and columns of the first feature maps and the number of classes (0: none) of a model in JSON, after
    comparing its layers with the reference's."""
    inputs, layers = _unwrap(model)
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
    described = [(layer["class_name"], layer["config"]) for layer in layers]
    expected = [(layer.kind, layer.settings) for layer in LAYERS]
    for (kind, settings), (expected_kind, values) in zip_longest(described, expected, fillvalue=END):
        there = f"{kind} {settings.get('name')!r}" if kind else "the end"
        if kind != expected_kind:
            raise ValueError(f"{there} comes where {expected_kind or 'the end'} should")
        for key, value in values.items():
            if settings.get(key, value) != value:
                raise ValueError(f"{there} has {key} {settings[key]!r}, expected {value!r}")
    reshape = layers[1]["config"]
    height, width, channels = target = reshape["target_shape"]
    if not all(isinstance(side, int) and side > 0 for side in target):
        raise ValueError(f"{reshape.get('name')!r} has target_shape {target}, expected positive integers")
    name, shape = weights[1][0], weights[1][1]["gamma"].shape
    if shape != (channels,):
        raise ValueError(f"layer {name!r} has a gamma of shape {shape}, expected ({channels},)")
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
    inputs = {item["name"]: math.prod((item.get("batch_input_shape") or item["batch_shape"])[1:]) for item in settings}
    if len(inputs) > 1:
        inputs = {name: inputs[name] for name in _strings(config["input_layers"]) if name in inputs}
    return inputs, layers


def _strings(node: Any) -> Iterator[str]:
    """Yields the strings in nested JSON, in order: references to layers are nested differently in each Keras."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)


def _guess_geometry(num_layers: int, weights: Weights) -> tuple[int, int, int]:
    """Returns what `_geometry` does for weights alone, on the assumption that the images are square."""
    (name, dense), (_, norm) = weights[:2]
    units, channels = dense["bias"].size, norm["gamma"].size
    side = math.isqrt(units // max(channels, 1))
    reason = ""
    if num_layers not in (len(LAYERS), len(LAYERS) + 1):  # a Sequential model does not count its input
        reason = f"weights alone, of {num_layers} layers instead of {len(LAYERS) + 1}, do not tell latents from classes"
    elif side * side * channels != units:
        reason = f"layer {name!r} makes {units} numbers, which are no square feature maps of {channels} channels"
    if reason:
        raise ValueError(f"{reason}; save the whole model with generator.save('FILE.keras')")
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
        module = generator.get_submodule(layer.module)
        for variable, array in arrays.items():
            key = f"{layer.module}.{VARIABLES[layer.kind][variable]}"
            axes = KERNEL_AXES[type(module)] if variable == "kernel" else (0,)
            shape = tuple(state[key].shape[axes.index(axis)] for axis in range(len(axes)))
            if array.shape != shape:
                raise ValueError(f"layer {name!r} has a {variable} of shape {array.shape}, expected {shape}")
            tensor = torch.from_numpy(array[()].astype(np.float32)).permute(axes)
            # With stride 1 a transposed convolution is a convolution with the kernel flipped, and mirrored as it was.
            state[key] = tensor if isinstance(module, nn.Conv2d) else mirror(key, tensor, generator.base)
        if layer.kind == "BatchNormalization":
            state[f"{layer.module}.num_batches_tracked"] = torch.tensor(0)
    generator.to_empty(device="cpu").load_state_dict(state)
    return generator


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
    classes = {"classes": generator.num_classes} if generator.num_classes else {}
    inputs = {"latents": generator.config.latent_dim} | classes
    layers, arrays = list[dict[str, Any]](), dict[str, dict[str, Any]]()

    def add(kind: str, name: str, settings: dict[str, Any], sources: list[str]) -> list[str]:
        nodes = [[[source, 0, 0, {}] for source in sources]] if sources else []
        layers.append({"class_name": kind, "name": name, "config": {"name": name} | settings, "inbound_nodes": nodes})
        return [name]

    for name, length in inputs.items():
        add("InputLayer", name, {"batch_input_shape": [None, length], "dtype": "float32", "sparse": False}, [])
    tip = list(inputs)
    if classes:
        tip = add("Concatenate", "concatenate", {"axis": -1}, tip)
    for layer in LAYERS:
        tip = add(layer.kind, layer.name, _settings(generator, layer), tip)
        if layer.module:
            arrays[layer.name] = _arrays(generator, layer)
    ends = {"input_layers": [[name, 0, 0] for name in inputs], "output_layers": [[name, 0, 0] for name in tip]}
    model = {"class_name": "Model", "config": {"name": "generator", "layers": layers, **ends}}
    content = BytesIO()  # HDF5 reports a full disk with errors of its own, and again when the file is closed
    with h5py.File(content, "w") as file:
        root = file.create_group("model_weights")
        for holder in (file, root):
            holder.attrs["keras_version"], holder.attrs["backend"] = KERAS_VERSION.encode(), b"tensorflow"
        file.attrs["model_config"] = json.dumps(model).encode()
        root.attrs["layer_names"] = [layer["name"].encode() for layer in layers]
        for name in (layer["name"] for layer in layers):
            group, variables = root.create_group(name), arrays.get(name, {})
            # Keras writes an empty list of names as an empty array of numbers.
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in variables] or np.zeros(0)
            for key, array in variables.items():
                group[f"{name}/{key}:0"] = array
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _settings(generator: Generator, layer: Layer) -> dict[str, Any]:
    settings = {key: value for key, value in layer.settings.items() if key != "groups"}  # which later versions write
    match layer.kind:
        case "Dense":
            settings["units"] = generator.dense.out_features
        case "Reshape":
            settings["target_shape"] = [*generator.base, generator.norms[0].num_features]
        case "Conv2DTranspose":
            module: Any = generator.convolutions[layer.number]
            settings |= {"filters": module.out_channels, "kernel_size": list(module.kernel_size)}
    return settings


def _arrays(generator: Generator, layer: Layer) -> dict[str, Any]:
    """Returns Keras's arrays of a layer by variable: what `_build` does, backwards."""
    module, state, arrays = generator.get_submodule(layer.module), generator.state_dict(), {}
    for variable, name in VARIABLES[layer.kind].items():
        key = f"{layer.module}.{name}"
        tensor = state[key].detach().float().cpu()
        if not isinstance(module, nn.Conv2d):
            tensor = mirror(key, tensor, generator.base)
        if variable == "kernel":
            tensor = tensor.permute(*np.argsort(KERNEL_AXES[type(module)]).tolist())
        arrays[variable] = tensor.numpy()
    return arrays
