from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pipeline.export.generator_file import load_generator, save_export
from pipeline.export.keras_files import save_keras
from tests.export.generators import random_generator
from tests.jobs import launch
from tests.keras_reference import keras_generator

LINEAR = """activation use_bias kernel_initializer bias_initializer kernel_regularizer bias_regularizer
activity_regularizer kernel_constraint bias_constraint"""
ATTRIBUTES = {
    "InputLayer": "name batch_input_shape dtype sparse",
    "Concatenate": "name trainable axis",
    "Dense": f"name trainable units {LINEAR}",
    "Reshape": "name trainable target_shape",
    "BatchNormalization": """name trainable axis momentum epsilon center scale beta_initializer gamma_initializer
    moving_mean_initializer moving_variance_initializer beta_regularizer gamma_regularizer beta_constraint
    gamma_constraint""",
    "Activation": "name trainable activation",
    "Conv2DTranspose": f"""name trainable filters kernel_size strides padding data_format dilation_rate output_padding
    {LINEAR}""",
}
"""What `get_config` gives in Keras 2.2.4: keras/engine/base_layer.py (Layer) and input_layer.py, keras/layers/core.py
(Dense, Reshape, Activation), merge.py, normalization.py, convolutional.py (_Conv, of which Conv2D drops "rank" and to
which Conv2DTranspose adds "output_padding")."""

SHAPES = {"wgan": (0, (1, 28, 28)), "acgan": (10, (1, 28, 28)), "colour": (3, (3, 32, 24))}


@pytest.mark.parametrize(("num_classes", "shape"), SHAPES.values(), ids=SHAPES)
def test_what_is_written_is_read_back_bit_for_bit(
    num_classes: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    generator = random_generator(num_classes, shape)
    save_keras(generator, tmp_path / "generator.h5")
    again = load_generator(tmp_path / "generator.h5", "ema")
    assert (again.config, again.image_shape, again.num_classes) == (generator.config, shape, num_classes)
    state = generator.state_dict()
    assert [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, state[name])] == []


@pytest.mark.parametrize(("num_classes", "shape"), SHAPES.values(), ids=SHAPES)
def test_keras_makes_the_same_images_of_the_file(num_classes: int, shape: tuple[int, int, int], tmp_path: Path) -> None:
    generator, latents = (
        random_generator(num_classes, shape),
        torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    )
    labels = torch.arange(2) if num_classes else None
    save_keras(generator, tmp_path / "generator.h5")
    with h5py.File(tmp_path / "generator.h5") as file:
        root = file["model_weights"]
        names = list(map(str, root.attrs["layer_names"]))
        listed = [(name, list(map(str, root[name].attrs["weight_names"]))) for name in names]
        stages = [
            {weight.split("/")[-1].removesuffix(":0"): root[name][weight][()] for weight in weights}
            for name, weights in listed
            if weights
        ]
        model = json.loads(file.attrs["model_config"])
    reshape = next(layer for layer in model["config"]["layers"] if layer["class_name"] == "Reshape")
    base = reshape["config"]["target_shape"]
    images = generator(latents, labels).flip(2, 3).permute(0, 2, 3, 1)
    for index, image in enumerate(images):
        given = np.concatenate([latents[index].numpy(), np.eye(num_classes)[index] if num_classes else []])
        expected = keras_generator(stages, base, given)
        assert expected.std() > 0.01
        assert np.abs(image.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(("num_classes", "shape"), SHAPES.values(), ids=SHAPES)
def test_layers_have_the_attributes_of_keras_2_2_4(
    num_classes: int, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """Its `load_model` and Keras 3's refuse a file with any other, and give those that are missing their defaults."""
    save_keras(random_generator(num_classes, shape), tmp_path / "generator.h5")
    with h5py.File(tmp_path / "generator.h5") as file:
        layers = json.loads(file.attrs["model_config"])["config"]["layers"]
    assert {layer["class_name"] for layer in layers} == ATTRIBUTES.keys() - ({"Concatenate"} if not num_classes else {})
    for layer in layers:
        assert set(layer["config"]) <= set(ATTRIBUTES[layer["class_name"]].split()), layer["name"]


def test_the_command_writes_it(tmp_path: Path) -> None:
    save_export(random_generator(), tmp_path / "in.safetensors", {})
    result = launch("pipeline.export", [str(tmp_path / "in.safetensors"), str(tmp_path / "out.h5")])
    assert result.returncode == 0, result.stderr
    assert load_generator(tmp_path / "out.h5", "ema").image_shape == (1, 28, 28)
