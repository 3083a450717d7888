"""A trained generator in one safetensors file, with what it takes to rebuild it in the header."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.models.networks import Generator, mirror_state
from pipeline.storage.checkpoint import Checkpoint, find, read_checkpoint, sha256_of_tensor
from pipeline.storage.files import replacing
from pipeline.storage.run_folder import RunFolder

FORMAT = "gan-pipeline generator 2"
"""Weights are mirrored, as the networks have them."""
KERAS_FORMAT = "gan-pipeline generator 1"
"""Earlier files: weights in Keras's orientation."""
KERAS_SUFFIXES = (".h5", ".hdf5")
EXPORT_SUFFIXES = (".safetensors", *KERAS_SUFFIXES)
"""Single files that `load_generator` reads; its other sources are folders."""
HUB_WEIGHTS = "model.safetensors"
"""An export by the name that it has in a folder of the Hugging Face Hub."""


def save_export(generator: Generator, path: Path, provenance: dict[str, Any]) -> None:
    """Writes the generator's weights and moving statistics, atomically.

    Args:
        provenance: JSON-serialisable facts for the header (run, step, dataset fingerprint).
    """
    header = {"format": FORMAT, "generator": json.dumps(generator.spec()), "provenance": json.dumps(provenance)}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in generator.state_dict().items()}, temporary, header)


def load_export(path: Path) -> Generator:
    """The generator of an export, on the CPU in eval mode.

    Raises:
        UserError: the file is missing, not an export, or its tensors do not fit its header.
    """
    return _read_export(path)[0]


def _read_export(path: Path) -> tuple[Generator, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.get("format") not in {FORMAT, KERAS_FORMAT}:
            raise ValueError(f"its header does not say {FORMAT!r}")
        generator = Generator.from_spec(json.loads(header["generator"]))
        if header["format"] == KERAS_FORMAT:
            tensors = mirror_state(generator, tensors)
        generator.to(tensors["dense.weight"].dtype).load_state_dict(tensors)
        provenance = dict(json.loads(header.get("provenance", "{}")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give an export, e.g. runs/NAME/export/generator.safetensors") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a generator export of this pipeline ({reason})") from None
    return _frozen(generator), provenance


def generator_of(checkpoint: Checkpoint, weights: str) -> Generator:
    """The generator of a checkpoint, on the CPU in eval mode; `weights`: "ema" or "raw"."""
    prefix = "ema." if weights == "ema" else "generator."
    tensors = checkpoint.tensors()
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    generator = Generator.from_spec(checkpoint.progress["generator"])
    generator.to(own["dense.weight"].dtype).load_state_dict(own)
    return _frozen(generator)


def load_generator(path: str | Path, weights: str = "ema") -> Generator:
    """The generator alone of `read_generator`: latents (n, latent_dim) -> mirrored images (n, C, H, W) in [0, 1], which
    `render_range` and `render` of pipeline/export/images.py turn into uint8 ones, the right way round."""
    return read_generator(Path(path), weights)[0]


def read_generator(path: Path, weights: str) -> tuple[Generator, dict[str, Any]]:
    """The generator of an export or a folder that is one for the Hugging Face Hub, of a Keras notebook's .h5, of a
    checkpoint's folder, or of a run's folder (its newest intact checkpoint; damaged newer ones are named in the log),
    on the CPU in eval mode. `weights`, "ema" or "raw", chooses among a checkpoint's.

    With it comes where it is from: of a checkpoint "step" and "weights", of one in its run's folder also "run" and the
    "dataset"'s fingerprint (null where the run does not tell), of an export what its header says.

    Raises:
        UserError: it is none of these, or damaged.
    """
    if (path / HUB_WEIGHTS).is_file():
        return _read_export(path / HUB_WEIGHTS)
    if path.is_dir():
        run = RunFolder(path)
        checkpoint = find(run) if run.has_begun else read_checkpoint(path).verify()
        facts: dict[str, Any] = {"step": checkpoint.step, "weights": weights}
        if (run := RunFolder(checkpoint.folder.resolve().parent.parent)).has_begun:
            facts |= {"run": run.path.name, "dataset": run.dataset_fingerprint}
        return generator_of(checkpoint, weights), facts
    if path.suffix in KERAS_SUFFIXES:
        from pipeline.export.keras_h5 import load_keras  # h5py is for these files alone

        return _frozen(load_keras(path)), {}
    return _read_export(path)


def fingerprint(generator: Generator) -> str:
    """SHA-256 of what the generator computes with: equal for the live network, its checkpoint and its export."""
    digest = sha256(json.dumps(generator.spec(), sort_keys=True).encode())
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sha256_of_tensor(tensor.cpu())}".encode())
    return digest.hexdigest()


def _frozen(generator: Generator) -> Generator:
    return generator.eval().requires_grad_(False).to(memory_format=torch.channels_last)
