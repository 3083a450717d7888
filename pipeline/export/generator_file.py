"""A trained generator in one safetensors file, with what it takes to rebuild it in the header; the networks of
checkpoints."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.config import NetworkConfig
from pipeline.errors import UserError
from pipeline.models.networks import AnyGenerator, Critic, Generator, mirror_state
from pipeline.models.spectral_norm import SINGULAR_VECTORS, use_spectral_norm
from pipeline.models.user_networks import generator_of_spec, preserve_global_rng
from pipeline.storage.checkpoint import Checkpoint, find, read_checkpoint, sha256_of_tensor
from pipeline.storage.files import write_tensors
from pipeline.storage.run_folder import RunFolder

FORMAT = "gan-pipeline generator 2"
"""Weights are mirrored, as the networks have them."""
KERAS_FORMAT = "gan-pipeline generator 1"
"""Earlier files: weights in Keras's orientation."""
KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
EXPORT_SUFFIXES = (".safetensors", *KERAS_SUFFIXES)
"""Single files that `load_generator` reads; its other sources are folders."""
CLASS_NAMES = "class_names"
"""Where an export's header, a checkpoint's progress and ONNX's metadata hold the names of the classes, as a JSON list.
Files of earlier versions have none."""
HUB_WEIGHTS = "model.safetensors"
"""An export by the name that it has in a folder of the Hugging Face Hub."""


def save_export(generator: AnyGenerator, path: Path, provenance: dict[str, Any]) -> None:
    """Writes the generator's weights and moving statistics, atomically.

    Args:
        provenance: JSON-serialisable facts for the header (run, step, dataset fingerprint).
    """
    header = {"format": FORMAT, "generator": json.dumps(generator.spec()), "provenance": json.dumps(provenance)}
    if generator.class_names:
        header[CLASS_NAMES] = json.dumps(generator.class_names)
    own = generator.state_dict()
    # Copies: safetensors has no strides, and no two names of one tensor, as a network of the user's may have.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}
    write_tensors(path, tensors, header)


def load_export(path: Path, code: str | None = None) -> AnyGenerator:
    """The generator of an export, on the CPU in eval mode; `code`: see `read_generator`.

    Raises:
        UserError: the file is missing, not an export, its tensors do not fit its header, or it takes code.
    """
    return _read_export(path, code)[0]


def _read_export(path: Path, code: str | None) -> tuple[AnyGenerator, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.get("format") not in {FORMAT, KERAS_FORMAT}:
            raise ValueError(f"its header does not say {FORMAT!r}")
        generator = generator_of_spec(json.loads(header["generator"]), code, path)
        if header["format"] == KERAS_FORMAT and isinstance(generator, Generator):
            tensors = mirror_state(generator, tensors)
        _load(generator, tensors)
        _name_classes(generator, json.loads(header.get(CLASS_NAMES, "[]")))
        provenance = dict(json.loads(header.get("provenance", "{}")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give an export, e.g. runs/NAME/export/generator.safetensors") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a generator export of this pipeline ({reason})") from None
    return _frozen(generator), provenance


def generator_of(checkpoint: Checkpoint, weights: str, code: str | None = None) -> AnyGenerator:
    """The generator of a checkpoint, on the CPU in eval mode. `weights`: "ema" or "raw". `code`: see
    `read_generator`."""
    prefix = "ema." if weights == "ema" else "generator."
    tensors = checkpoint.tensors()
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    generator = generator_of_spec(checkpoint.progress["generator"], code, checkpoint.folder)
    _load(generator, own)
    _name_classes(generator, checkpoint.progress.get(CLASS_NAMES, []))
    return _frozen(generator)


@preserve_global_rng
def critic_of(checkpoint: Checkpoint) -> Critic | None:
    """The critic of a checkpoint, on the CPU; None where it holds none of the reference's."""
    own = {name.removeprefix("critic."): t for name, t in checkpoint.tensors().items() if name.startswith("critic.")}
    biases = own.get("score.bias")
    if biases is None:
        return None
    spec = checkpoint.progress["generator"]
    config = NetworkConfig(latent_dim=spec["network"]["latent_dim"], width=spec["network"]["width"])
    critic = Critic(config, tuple(spec["image_shape"]), spec["num_classes"]).to(biases.dtype)
    if any(name.endswith(SINGULAR_VECTORS) for name in own):
        use_spectral_norm(critic, torch.Generator())
    critic.load_state_dict(own)
    return critic.requires_grad_(False).to(memory_format=torch.channels_last)


def load_generator(path: str | Path, weights: str = "ema", code: str | None = None) -> AnyGenerator:
    """The generator alone of `read_generator`: latents (n, latent_dim) -> mirrored images (n, C, H, W) in [0, 1], which
    `render_range` and `render` of pipeline/export/images.py turn into uint8 ones, the right way round."""
    return read_generator(Path(path), weights, code)[0]


def read_generator(path: Path, weights: str, code: str | None = None) -> tuple[AnyGenerator, dict[str, Any]]:
    """The generator of an export or a folder that is one for the Hugging Face Hub, of a Keras notebook's .h5 or
    .keras, of a checkpoint's folder, or of a run's folder (its newest intact checkpoint; damaged newer ones are named
    in the log), on the CPU in eval mode. `weights`, "ema" or "raw", chooses among a checkpoint's. `code` is module:NAME
    of the network, where it is one of its user's own: a file never makes the program import what it names, only its
    reader does.

    With it comes where it is from: of a checkpoint "step" and "weights", of one in its run's folder also "run" and the
    "dataset"'s fingerprint (null where the run does not tell), of an export what its header says.

    Raises:
        UserError: it is none of these, damaged, or takes code that the caller does not name.
    """
    if (path / HUB_WEIGHTS).is_file():
        return _read_export(path / HUB_WEIGHTS, code)
    if path.is_dir():
        run = RunFolder(path)
        checkpoint = find(run) if run.has_begun else read_checkpoint(path).verify()
        facts: dict[str, Any] = {"step": checkpoint.step, "weights": weights}
        if (run := RunFolder(checkpoint.folder.resolve().parent.parent)).has_begun:
            facts |= {"run": run.path.name, "dataset": run.dataset_fingerprint}
        return generator_of(checkpoint, weights, code), facts
    if path.suffix in KERAS_SUFFIXES:
        from pipeline.export.keras_h5 import load_keras  # h5py is for these files alone

        return _frozen(load_keras(path)), {}
    return _read_export(path, code)


def fingerprint(generator: AnyGenerator) -> str:
    """SHA-256 of what the generator computes with: equal for the live network, its checkpoint and its export."""
    digest = sha256(json.dumps(generator.spec(), sort_keys=True).encode())
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sha256_of_tensor(tensor.cpu())}".encode())
    return digest.hexdigest()


def _load(generator: AnyGenerator, tensors: dict[str, Tensor]) -> None:
    name, _ = next(generator.named_parameters())
    generator.to(tensors[name].dtype).load_state_dict(tensors)


def _name_classes(generator: AnyGenerator, names: object) -> None:
    """Takes over a file's names. Raises ValueError unless they are none or a text for each class."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{CLASS_NAMES} is not a list of texts")
    if len(names) not in (0, generator.num_classes):
        raise ValueError(f"{CLASS_NAMES} has {len(names)} names of {generator.num_classes} classes")
    generator.class_names = tuple(names)


def _frozen(generator: AnyGenerator) -> AnyGenerator:
    generator.eval().requires_grad_(False)
    return generator.to(memory_format=torch.channels_last) if isinstance(generator, Generator) else generator
