"""Generators of the Keras notebooks, in files written here by the documented layout, against Keras's definition."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.export.generator_file import load_generator
from pipeline.export.keras_files import load_keras
from tests.jobs import ROOT, launch
from tests.keras_reference import keras_generator


@dataclass
class Saved:
    """A Keras model as it goes into a file; tests change it before that."""

    stages: list[tuple[str, dict[str, Any]]]
    """Layers with weights, in the model's order: name, and arrays in Keras's order."""
    model: dict[str, Any]
    """model_config."""
    base: tuple[int, int, int]
    links: dict[str, Any] = field(default_factory=dict)
    """Array name -> what stands in the file instead of the array."""

    def layer(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(layer for layer in self.layers if layer["config"]["name"] == name)
        return found

    @property
    def layers(self) -> list[dict[str, Any]]:
        layers: list[dict[str, Any]] = self.model["config"]["layers"]
        return layers


def counts(width: float) -> list[int]:
    return [round(count * width) for count in (128, 128, 64, 32)]


def keras(
    seed: int = 0,
    *,
    latent_dim: int = 6,
    classes: int = 0,
    width: float = 0.1,
    base: tuple[int, int] = (7, 7),
    channels: int = 1,
    number: int = 1,
) -> Saved:
    """A generator with random weights, of the scale of trained ones, and its configuration as Keras 2.2 writes it.

    Args:
        number: Of the first layer of each kind; a file from a session that built other models before begins higher.
    """
    random = np.random.default_rng(seed)
    inputs = {"z_input": latent_dim} | ({"class_labels": classes} if classes else {})
    stages: list[tuple[str, dict[str, Any]]] = []
    layers = []
    tip: list[str] = []

    def add(kind: str, name: str, settings: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
        nonlocal tip
        nodes = [[[source, 0, 0, {}] for source in tip]] if tip else []
        layers.append({"class_name": kind, "name": name, "config": {"name": name} | settings, "inbound_nodes": nodes})
        if arrays:
            stages.append((name, {key: array.astype(np.float32) for key, array in arrays.items()}))
        tip = [name]

    def kernel(*shape: int) -> Any:
        return random.normal(0, (8 / (25 * shape[-1] if len(shape) == 4 else shape[0])) ** 0.5, shape)

    for name, size in inputs.items():
        tip = []
        add("InputLayer", name, {"batch_input_shape": [None, size]})
    tip = list(inputs)
    if classes:
        add("Concatenate", f"concatenate_{number}", {"axis": 1})
    first, *filters = counts(width)
    units = base[0] * base[1] * first
    linear = {"activation": "linear", "use_bias": True}
    dense = {"kernel": kernel(latent_dim + classes, units), "bias": random.normal(0, 0.3, units)}
    add("Dense", f"dense_{number}", {"units": units} | linear, dense)
    add("Reshape", f"reshape_{number}", {"target_shape": [*base, first]})
    count = first
    for i, out in enumerate([*filters, channels], number):
        norm = {
            "gamma": random.normal(1, 0.2, count),
            "beta": random.normal(0, 0.3, count),
            "moving_mean": random.normal(0, 0.3, count),
            "moving_variance": random.uniform(0.5, 2, count),
        }
        add("BatchNormalization", f"batch_normalization_{i}", {"axis": -1, "momentum": 0.99, "epsilon": 1e-3}, norm)
        add("Activation", f"activation_{i}", {"activation": "relu"})
        stride = 2 if i < number + 2 else 1
        settings = linear | {"filters": out, "kernel_size": [5, 5], "strides": [stride, stride], "padding": "same"}
        convolution = {"kernel": kernel(5, 5, out, count), "bias": random.normal(0, 0.3, out)}
        add("Conv2DTranspose", f"conv2d_transpose_{i}", settings, convolution)
        count = out
    add("Activation", f"activation_{number + 4}", {"activation": "sigmoid"})
    config = {
        "name": "generator",
        "layers": layers,
        "input_layers": [[name, 0, 0] for name in inputs],
        "output_layers": [[tip[0], 0, 0]],
    }
    return Saved(stages, {"class_name": "Model", "config": config}, (*base, first))


def write(
    path: Path,
    saved: Saved,
    *,
    text: Callable[[str], Any] = str.encode,
    suffix: str = ":0",
    prefix: str = "",
    nested: bool = False,
    weights_alone: bool = False,
) -> Path:
    """The file that Keras writes.

    Args:
        text: Makes an attribute of a string: bytes up to Keras 2.2, str later.
        suffix: Of weight names: ":0" in Keras 2, none in Keras 3.
        prefix: Of weight names: the model's name in some versions.
        nested: All arrays in one group, as of a model that a model calls.
        weights_alone: The file of `save_weights`.
    """

    def attribute(values: list[str]) -> Any:
        return [text(value) for value in values] or np.zeros(0)  # Keras's empty lists become floating-point arrays

    with h5py.File(path, "w") as file:
        root = file
        if not weights_alone:
            file.attrs["model_config"] = text(json.dumps(saved.model))
            file.attrs["keras_version"], file.attrs["backend"] = text("2.2.4"), text("tensorflow")
            root = file.create_group("model_weights")
        arrays = {
            name: {f"{prefix}{name}/{key}{suffix}": array for key, array in variables.items()}
            for name, variables in saved.stages
        }
        names = [layer["config"]["name"] for layer in saved.layers]
        if nested:
            arrays = {"generator": {name: array for part in arrays.values() for name, array in part.items()}}
        root.attrs["layer_names"] = attribute(names)
        for name in names:
            group = root.create_group(name)
            group.attrs["weight_names"] = attribute(list(arrays.get(name, {})))
            for weight_name, array in arrays.get(name, {}).items():
                if weight_name in saved.links:
                    saved.links[weight_name](group, weight_name)
                else:
                    group[weight_name] = array
    return path


def assert_same_images(path: Path, saved: Saved, latent_dim: int, classes: int = 0, num_images: int = 2) -> None:
    generator = load_generator(path, "ema")
    assert (generator.config.latent_dim, generator.num_classes) == (latent_dim, classes)
    assert not generator.training
    assert generator.get_parameter("dense.weight").dtype == torch.float32
    random = np.random.default_rng(7)
    latents = random.uniform(-1, 1, (num_images, latent_dim)).astype(np.float32)
    labels = random.integers(0, max(classes, 1), num_images)
    with torch.no_grad():
        mirrored = generator(torch.from_numpy(latents), torch.from_numpy(labels) if classes else None)
    images = mirrored.flip(2, 3)
    stages = [arrays for _, arrays in saved.stages]
    for image, latent, label in zip(images, latents, labels, strict=True):
        expected = keras_generator(
            stages, saved.base, np.concatenate([latent, np.eye(classes)[label]] if classes else [latent])
        )
        assert expected.std() > 0.05
        assert tuple(image.shape) == (expected.shape[2], *expected.shape[:2])
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 1e-5


SIBLINGS: dict[str, dict[str, Any]] = {
    "wgan": {},
    "lsgan": {"latent_dim": 9, "width": 0.25},
    "acgan": {"latent_dim": 6, "classes": 10},
    "three classes": {"latent_dim": 3, "classes": 3, "width": 0.05},
    "colour": {"base": (8, 8), "channels": 3, "width": 0.2},
    "not square": {"base": (3, 6), "width": 0.4},
    "late in a session": {"number": 8},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_images_are_those_of_keras(sibling: str, seed: int, tmp_path: Path) -> None:
    settings = SIBLINGS[sibling]
    saved = keras(seed, **settings)
    path = write(tmp_path / "generator.h5", saved)
    assert_same_images(path, saved, settings.get("latent_dim", 6), settings.get("classes", 0))


def test_the_references_own_size(tmp_path: Path) -> None:
    saved = keras(latent_dim=100, width=1)
    path = write(tmp_path / "wgan_mnist.hdf5", saved)
    assert_same_images(path, saved, 100, num_images=1)
    generator = load_keras(path)
    assert generator.config.width == 1
    assert generator.image_shape == (1, 28, 28)


def no_numbers(saved: Saved) -> Saved:
    """tf.keras gives the first layer of each kind no number."""
    return json_changed(saved, lambda text: text.replace('_1"', '"'), lambda name: name.removesuffix("_1"))


def keras_3(saved: Saved) -> Saved:
    """Shapes and layer references as Keras 3 writes them."""
    for layer in saved.layers:
        if layer["class_name"] == "InputLayer":
            layer["config"]["batch_shape"] = layer["config"].pop("batch_input_shape")
        tensors = [
            {"class_name": "__keras_tensor__", "config": {"shape": [None, 1], "keras_history": source[:3]}}
            for node in layer["inbound_nodes"]
            for source in node
        ]
        if tensors:
            arguments = [tensors] if layer["class_name"] == "Concatenate" else tensors
            layer["inbound_nodes"] = [{"args": arguments, "kwargs": {"mask": None}}]
    inputs: list[Any] = saved.model["config"]["input_layers"]
    saved.model = {"class_name": "Functional", "config": saved.model["config"]}
    if len(inputs) == 1:
        saved.model["config"]["input_layers"] = inputs[0]
    return saved


def json_changed(saved: Saved, change: Callable[[str], str], rename: Callable[[str], str]) -> Saved:
    return Saved(
        [(rename(name), arrays) for name, arrays in saved.stages],
        json.loads(change(json.dumps(saved.model))),
        saved.base,
    )


def wrapped(saved: Saved) -> Saved:
    """A model with inputs of its own that calls the generator."""
    inputs = [layer for layer in saved.layers if layer["class_name"] == "InputLayer"]
    outer = [layer | {"config": layer["config"] | {"name": f"outer_{layer['name']}"}} for layer in inputs]
    config = {
        "name": "model_1",
        "layers": [*outer, saved.model],
        "input_layers": [[layer["config"]["name"], 0, 0] for layer in outer],
    }
    saved.model = {"class_name": "Functional", "config": config}
    return saved


def sequential(saved: Saved) -> Saved:
    """A Sequential model, which has no layer for its input."""
    saved.model = {"class_name": "Sequential", "config": {"name": "sequential", "layers": saved.layers[1:]}}
    return saved


LAYOUTS: dict[str, tuple[Callable[[Saved], Saved], dict[str, Any]]] = {
    "tf.keras": (no_numbers, {"text": str}),
    "Keras 3": (keras_3, {"text": str, "suffix": ""}),
    "model name in the weight names": (lambda saved: saved, {"prefix": "generator/"}),
    "nested": (wrapped, {"nested": True}),
    "nested, with the model's name": (wrapped, {"nested": True, "prefix": "generator/", "text": str}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [0, 10])
def test_layouts_of_other_versions(layout: str, classes: int, tmp_path: Path) -> None:
    change, options = LAYOUTS[layout]
    saved = keras(3, classes=classes)
    arranged = change(Saved(saved.stages, json.loads(json.dumps(saved.model)), saved.base))
    assert_same_images(write(tmp_path / "generator.h5", arranged, **options), saved, 6, classes)


@pytest.mark.parametrize("weights_alone", [False, True])
def test_a_sequential_model(weights_alone: bool, tmp_path: Path) -> None:
    saved = sequential(keras(4))
    assert_same_images(write(tmp_path / "generator.h5", saved, weights_alone=weights_alone), saved, 6)


def test_weights_alone(tmp_path: Path) -> None:
    saved = keras(5, width=0.3)
    assert_same_images(write(tmp_path / "generator.h5", saved, weights_alone=True), saved, 6)


@pytest.mark.parametrize("width", [0.04, 0.05, 0.105, 0.3, 0.5, 0.77, 1, 1.3, 2])
def test_width_is_the_shortest_number_that_gives_the_channels(width: float, tmp_path: Path) -> None:
    saved = keras(width=width, base=(1, 1))
    found = load_keras(write(tmp_path / "generator.h5", saved)).config.width
    assert counts(found) == counts(width)
    assert len(repr(found)) <= len(repr(float(width)))


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """The reason in the one line that tells it."""
    with pytest.raises(UserError) as caught:
        load_generator(path, "ema")
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"{path}: not a generator of the reference's Keras notebooks (")
    return text


def swap(saved: Saved, stage: int, variable: str, change: Callable[[Any], Any]) -> None:
    saved.stages[stage][1][variable] = change(saved.stages[stage][1][variable])


def set_config(name: str, key: str, value: Any) -> Callable[[Saved], None]:
    return lambda saved: saved.layer(name)["config"].update({key: value})


def channel(saved: Saved) -> None:
    """One channel more between the third and the fourth convolution: shapes fit each other, but no width."""
    for stage, variable, axis in [(6, "kernel", 2), (6, "bias", 0), *((7, norm, 0) for norm in saved.stages[7][1])]:
        swap(saved, stage, variable, lambda array, axis=axis: np.repeat(array, 2, axis))  # type: ignore[misc]
    swap(saved, 8, "kernel", lambda array: np.repeat(array, 2, 3))


def last_block_removed(saved: Saved) -> None:
    del saved.stages[7:], saved.layers[12:15]


def dense_added(saved: Saved) -> None:
    saved.stages.append(("dense_2", {"kernel": np.zeros((1, 1)), "bias": np.zeros(1)}))
    saved.layers.append({"class_name": "Dense", "config": {"name": "dense_2"}})


NOT_HERE = "array dense_1/kernel is not one of floating-point numbers that this file holds"
CHANGES: dict[str, tuple[Callable[[Saved], Any], str]] = {
    "kernel in and out swapped": (
        lambda saved: swap(saved, 4, "kernel", lambda kernel: kernel.swapaxes(2, 3)),
        "layer 'conv2d_transpose_2' has a kernel of shape (5, 5, 13, 6), expected (5, 5, 6, 13)",
    ),
    "kernel channels first": (
        lambda saved: swap(saved, 8, "kernel", lambda kernel: kernel.transpose(2, 3, 0, 1)),
        "layer 'conv2d_transpose_4' has a kernel of shape (1, 3, 5, 5), expected (5, 5, 1, 3)",
    ),
    "kernel of 3 x 3": (
        lambda saved: swap(saved, 2, "kernel", lambda kernel: kernel[:3, :3]),
        "layer 'conv2d_transpose_1' has a kernel of shape (3, 3, 13, 13), expected (5, 5, 13, 13)",
    ),
    "dense kernel turned": (
        lambda saved: swap(saved, 0, "kernel", lambda kernel: kernel.T),
        "layer 'dense_1' has a kernel of shape (637, 6), expected (637, 637)",
    ),
    "dense bias cut": (
        lambda saved: swap(saved, 0, "bias", lambda bias: bias[1:]),
        "layer 'dense_1' has a bias of shape (636,), expected (637,)",
    ),
    "moving mean cut": (
        lambda saved: swap(saved, 5, "moving_mean", lambda mean: mean[:-1]),
        "layer 'batch_normalization_3' has a moving_mean of shape (5,), expected (6,)",
    ),
    "reshape": (
        set_config("reshape_1", "target_shape", [13, 7, 7]),
        "layer 'dense_1' has a kernel of shape (6, 637), expected (6, 1183)",
    ),
    "reshape of another size": (
        set_config("reshape_1", "target_shape", [8, 7, 13]),
        "layer 'dense_1' has a kernel of shape (6, 637), expected (6, 728)",
    ),
    "reshape to half a row": (
        set_config("reshape_1", "target_shape", [7.5, 7, 13]),
        "unsupported operand type(s) for <<: 'float' and 'int'",
    ),
    "no beta": (
        lambda saved: saved.stages[3][1].pop("beta"),
        "layer 'batch_normalization_2' holds gamma, moving_mean, moving_variance where gamma, beta, moving_mean, "
        "moving_variance should come",
    ),
    "order of layers": (
        lambda saved: saved.layers.insert(3, saved.layers.pop(5)),
        "layer 'conv2d_transpose_1' holds kernel, bias where gamma, beta, moving_mean, moving_variance should come",
    ),
    "a block less": (
        last_block_removed,
        "the weights end where gamma, beta, moving_mean, moving_variance should come",
    ),
    "a layer more": (
        dense_added,
        "layer 'dense_2' holds kernel, bias where the end should come",
    ),
    "channels of no width": (
        channel,
        "its channel counts [13, 13, 6, 6] are no multiple of the reference's [128, 128,",
    ),
    "epsilon": (
        set_config("batch_normalization_3", "epsilon", 1e-5),
        "BatchNormalization 'batch_normalization_3' has epsilon 1e-05, expected 0.001",
    ),
    "stride": (
        set_config("conv2d_transpose_3", "strides", [2, 2]),
        "Conv2DTranspose 'conv2d_transpose_3' has strides [2, 2], expected [1, 1]",
    ),
    "padding": (
        set_config("conv2d_transpose_1", "padding", "valid"),
        "Conv2DTranspose 'conv2d_transpose_1' has padding 'valid', expected 'same'",
    ),
    "data format": (
        set_config("conv2d_transpose_1", "data_format", "channels_first"),
        "Conv2DTranspose 'conv2d_transpose_1' has data_format 'channels_first', expected 'channels_last'",
    ),
    "hidden activation": (
        set_config("activation_2", "activation", "tanh"),
        "Activation 'activation_2' has activation 'tanh', expected 'relu'",
    ),
    "last activation": (
        set_config("activation_5", "activation", "tanh"),
        "Activation 'activation_5' has activation 'tanh', expected 'sigmoid'",
    ),
    "dense activation": (
        set_config("dense_1", "activation", "relu"),
        "Dense 'dense_1' has activation 'relu', expected 'linear'",
    ),
    "no last activation": (lambda saved: saved.layers.pop(), "the end comes where Activation should"),
    "dropout": (
        lambda saved: saved.layers.insert(5, {"class_name": "Dropout", "config": {"name": "dropout_1"}}),
        "Dropout 'dropout_1' comes where Conv2DTranspose should",
    ),
    "integers": (
        lambda saved: swap(saved, 0, "kernel", lambda kernel: kernel.astype(int)),
        NOT_HERE,
    ),
    "no layers": (lambda saved: saved.layers.clear(), "the weights end where kernel, bias should come"),
    "a Lambda": (
        lambda saved: saved.layers.insert(
            2, {"class_name": "Lambda", "config": {"name": "lambda_1", "function": ["4wA="]}}
        ),
        "Lambda 'lambda_1' comes where Reshape should",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_network_is_refused_with_the_layer_and_what_was_expected(change: str, tmp_path: Path) -> None:
    saved = keras()
    alter, expected = CHANGES[change]
    alter(saved)
    assert f"({expected}" in refusal(write(tmp_path / "generator.h5", saved))


def reverse_concatenation(saved: Saved) -> None:
    saved.layer("concatenate_1")["inbound_nodes"][0].reverse()


def third_input(saved: Saved) -> None:
    saved.layers.insert(2, {"class_name": "InputLayer", "config": {"name": "code", "batch_input_shape": [None, 1]}})
    saved.model["config"]["input_layers"].append(["code", 0, 0])
    saved.layer("concatenate_1")["inbound_nodes"][0].append(["code", 0, 0, {}])


JOINS: dict[str, tuple[Callable[[Saved], Any], str]] = {
    "classes first": (
        reverse_concatenation,
        "its inputs are z_input, class_labels and it joins class_labels, z_input: expected the latents first",
    ),
    "three inputs": (
        third_input,
        "its inputs are z_input, class_labels, code and it joins z_input, class_labels, code: ",
    ),
}


@pytest.mark.parametrize("change", JOINS)
def test_other_inputs_are_refused(change: str, tmp_path: Path) -> None:
    saved = keras(classes=10)
    alter, expected = JOINS[change]
    alter(saved)
    assert f"({expected}" in refusal(write(tmp_path / "generator.h5", saved))


def test_weights_alone_that_do_not_tell_the_classes_or_the_sides_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "acgan.h5", keras(classes=10), weights_alone=True)
    reason = "(weights alone tell neither latents from classes nor the sides of images that are not square; save the"
    assert reason in refusal(path)
    assert reason in refusal(write(tmp_path / "oblong.h5", keras(base=(3, 6)), weights_alone=True))


def external_link(group: Any, name: str) -> None:
    group[name] = h5py.ExternalLink("other.h5", "numbers")


def external_storage(group: Any, name: str) -> None:
    group.create_dataset(name, (6, 637), "f4", external=[("numbers", 0, 6 * 637 * 4)])


def virtual(group: Any, name: str) -> None:
    layout = h5py.VirtualLayout((6, 637), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "numbers", (6, 637))
    group.create_virtual_dataset(name, layout)


def huge(group: Any, name: str) -> None:
    group.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000))


def a_group(group: Any, name: str) -> None:
    group.create_group(name)


LINKS: dict[str, tuple[Callable[[Any, str], None], str]] = {
    "external link": (external_link, NOT_HERE),
    "external storage": (external_storage, NOT_HERE),
    "virtual": (virtual, NOT_HERE),
    "huge": (huge, NOT_HERE),
    "missing": (lambda group, name: None, '"Unable to'),
    "group": (a_group, NOT_HERE),
}


@pytest.mark.parametrize("kind", LINKS)
def test_arrays_that_are_not_in_the_file_are_refused(kind: str, tmp_path: Path) -> None:
    saved = keras()
    link, expected = LINKS[kind]
    saved.links["dense_1/kernel:0"] = link
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["numbers"] = np.zeros((6, 637), np.float32)
    (tmp_path / "numbers").write_bytes(bytes(6 * 637 * 4))
    assert f"({expected}" in refusal(write(tmp_path / "generator.h5", saved))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "kind", ["pickle", "text", "empty", "truncated", "json", "json list", "json depth", "no layers", "other layers"]
)
def test_a_file_that_is_no_keras_file_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "generator.h5", keras())
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    elif kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind in {"no layers", "other layers"}:
        with h5py.File(path, "w") as file:
            file["layers/dense/vars/0" if kind == "other layers" else "dense/0"] = np.zeros((6, 637), np.float32)
    else:
        with h5py.File(path, "a") as file:
            file.attrs["model_config"] = {"json": "[1", "json list": "[]", "json depth": "[" * 50_000}[kind]
    reason = refusal(path)
    assert not (tmp_path / "executed").exists()
    if kind == "other layers":
        assert "(layer 'dense' holds kernel where kernel, bias should come)" in reason
    if kind == "no layers":
        assert "(it does not name its layers; save it in Keras with generator.save('FILE.keras'))" in reason


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nothing.h5"
    with pytest.raises(UserError, match=re.escape(f"{path}: no such file; give a generator that Keras saved")):
        load_generator(path, "ema")


def test_the_program_draws_from_a_keras_file(tmp_path: Path) -> None:
    path = write(tmp_path / "acgan_mnist.h5", keras(classes=10))
    generate = ROOT / "pipeline/generate.py"
    assert launch(generate, ["-g", str(path), "--out", str(tmp_path / "grid.png")]).returncode == 0
    path.write_text("hello")
    result = launch(generate, ["-g", str(path), "--out", str(tmp_path / "another.png")])
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}: not a generator of the reference's Keras notebooks (")
    assert len(result.stderr.splitlines()) == 1
