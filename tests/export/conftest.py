"""Exports that several files draw from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import NetworkConfig
from pipeline.export.generator_file import save_export
from pipeline.models.networks import Generator, initialise
from pipeline.rng import seeded


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = Generator(NetworkConfig(latent_dim=6, width=0.1), (1, 28, 28))
    initialise(generator, seeded(0, "weights"))
    path = tmp_path_factory.mktemp("export") / "generator.safetensors"
    save_export(generator, path, {"run": "test", "step": 3})
    return path


@pytest.fixture(scope="session")
def classed_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = Generator(NetworkConfig(latent_dim=6, width=0.1), (1, 28, 28), num_classes=12)
    initialise(generator, seeded(1, "weights"))
    for name, tensor in generator.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(0.05)  # contrast, so that images differ
    path = tmp_path_factory.mktemp("export") / "generator.safetensors"
    save_export(generator, path, {})
    return path
