"""Writes a generator as the reference's Keras notebooks do, `generator.save("FILE.h5")`: their `-g FILE` and Keras's
`load_model` read it. The layout is that of `keras_h5.py`, which reads it back.

Each layer has the settings that Keras 2.2.4's own `get_config` gives, no more and no less: versions of Keras refuse
what they do not know, and what they do not find has their default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import nn

from pipeline.errors import UserError
from pipeline.export.keras_h5 import KERNEL_AXES, LAYERS, MODULES
from pipeline.models.networks import KERNEL, REFERENCE_DOUBLINGS, AnyGenerator, Generator, mirror
from pipeline.storage.files import replacing

KERAS_VERSION = "2.2.4"
"""The layout's; later versions of Keras read it."""
GLOROT_UNIFORM = {
    "class_name": "VarianceScaling",
    "config": {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None},
}
ZEROS, ONES = ({"class_name": name, "config": dict[str, Any]()} for name in ("Zeros", "Ones"))
LINEAR: dict[str, Any] = {
    "kernel_initializer": GLOROT_UNIFORM,
    "bias_initializer": ZEROS,
    **dict.fromkeys(("kernel_regularizer", "bias_regularizer", "activity_regularizer")),
    **dict.fromkeys(("kernel_constraint", "bias_constraint")),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Dense": LINEAR,
    "Conv2DTranspose": LINEAR,
    "BatchNormalization": {
        **{"axis": -1, "momentum": 0.99, "center": True, "scale": True},
        **dict.fromkeys(("beta_initializer", "moving_mean_initializer"), ZEROS),
        **dict.fromkeys(("gamma_initializer", "moving_variance_initializer"), ONES),
        **dict.fromkeys(("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")),
    },
}
"""Settings of Keras's layers that `LAYERS` does not ask for: they hold for every layer of the kind."""
NAMES = {"BatchNormalization": "batch_normalization", "Conv2DTranspose": "conv2d_transpose"}
"""What Keras calls such a layer, before its number."""


def save_keras(generator: AnyGenerator, path: Path) -> None:
    """Writes the whole model, float32, atomically. Its inputs are latents (n, latent_dim) and, with classes, one-hot
    classes (n, num_classes); its output is images (n, H, W, C), pixels in [0, 1], not mirrored.

    Raises:
        UserError: it is another network than the notebooks'.
    """
    if not isinstance(generator, Generator) or generator.doublings != REFERENCE_DOUBLINGS:
        raise UserError(f"{path}: the Keras notebooks have no network like this; write .safetensors or .onnx")
    layers = list(_layers(generator))
    inputs = [name for kind, name, _ in layers if kind == "InputLayer"]
    described, sources = list[dict[str, Any]](), inputs
    for kind, name, settings in layers:
        nodes = [] if kind == "InputLayer" else [[[source, 0, 0, {}] for source in sources]]
        described.append(
            {"class_name": kind, "name": name, "config": {"name": name} | settings, "inbound_nodes": nodes}
        )
        sources = sources if kind == "InputLayer" else [name]
    ends = {"input_layers": [[name, 0, 0] for name in inputs], "output_layers": [[name, 0, 0] for name in sources]}
    model = {"class_name": "Model", "config": {"name": "generator", "layers": described, **ends}}
    weighted = [name for kind, name, _ in layers if kind in {"Dense", "BatchNormalization", "Conv2DTranspose"}]
    arrays = dict(zip(weighted, _arrays(generator), strict=True))
    content = BytesIO()  # HDF5 tells of a full disk in its own ways, and again and again
    with h5py.File(content, "w") as file:
        root = file.create_group("model_weights")
        for holder in (file, root):
            holder.attrs["keras_version"], holder.attrs["backend"] = KERAS_VERSION.encode(), b"tensorflow"
        file.attrs["model_config"] = json.dumps(model).encode()
        root.attrs["layer_names"] = [name.encode() for _, name, _ in layers]
        for _, name, _ in layers:
            group, held = root.create_group(name), arrays.get(name, {})
            # Keras writes the names of none as an empty array of numbers.
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in held] or np.zeros(0)
            for key, array in held.items():
                group[f"{name}/{key}:0"] = array
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _layers(generator: Generator) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Class, name and settings of each of Keras's layers, the inputs first."""
    channels = [norm.num_features for norm in generator.norms] + [generator.image_shape[0]]
    inputs = {"latents": generator.config.latent_dim, "classes": generator.num_classes}
    for name, length in inputs.items():
        if length:
            yield "InputLayer", name, {"batch_input_shape": [None, length], "dtype": "float32", "sparse": False}
    if generator.num_classes:
        yield "Concatenate", "concatenate_1", {"trainable": True, "axis": -1}
    numbers = dict.fromkeys((kind for kind, _ in LAYERS), 0)
    for kind, settings in LAYERS:
        numbers[kind] += 1
        number = numbers[kind]
        given = {"trainable": True} | settings | SETTINGS.get(kind, {})
        given.pop("groups", None)  # of later versions
        if kind == "Dense":
            given["units"] = generator.dense.out_features
        elif kind == "Reshape":
            given["target_shape"] = [*generator.base, channels[0]]
        elif kind == "Conv2DTranspose":
            given |= {"filters": channels[number], "kernel_size": [KERNEL, KERNEL]}
        yield kind, f"{NAMES.get(kind, kind.lower())}_{number}", given


def _arrays(generator: Generator) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Keras's arrays of each layer with weights, by variable."""
    state = generator.state_dict()
    for path, names in MODULES:
        module, arrays = generator.get_submodule(path), {}
        for variable, own in names.items():
            name = f"{path}.{own}"
            tensor = state[name].detach().float().cpu()
            if not isinstance(module, nn.Conv2d):  # whose kernel stands as Keras has it (keras_h5.py)
                tensor = mirror(name, tensor, generator.base)
            if variable == "kernel":
                tensor = tensor.permute(*np.argsort(KERNEL_AXES[type(module)]).tolist())
            arrays[variable] = tensor.numpy()
        yield arrays
