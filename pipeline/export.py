"""A trained generator in one safetensors file, with what it takes to rebuild it in the header; or converted to ONNX.

`python -m pipeline.export SOURCE FILE`
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.checkpoint import Checkpoint, find, read_checkpoint
from pipeline.errors import UserError
from pipeline.keras_h5 import load_keras
from pipeline.models.networks import Generator
from pipeline.distributed.process import run_entry
from pipeline.storage.files import replacing

FORMAT = "gan-pipeline generator 1"
KERAS_SUFFIXES = (".h5", ".hdf5")
EXPORT_SUFFIXES = (".safetensors", *KERAS_SUFFIXES)
"""Single files that `load_generator` reads; its other sources are folders."""


def save_export(generator: Generator, path: Path, provenance: dict[str, Any]) -> None:
    """Writes the generator's weights and moving statistics, atomically.

    Args:
        provenance: JSON-serialisable facts for the header (run, step, dataset fingerprint).
    """
    header = {
        "format": FORMAT,
        "generator": json.dumps(generator.spec()),
        "provenance": json.dumps(provenance),
    }
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in generator.state_dict().items()}, temporary, header)


def load_export(path: Path) -> Generator:
    """The generator of an export, on the CPU in eval mode.

    Raises:
        UserError: the file is missing, not an export, or its tensors do not fit its header.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.get("format") != FORMAT:
            raise ValueError(f"its header does not say {FORMAT!r}")
        generator = Generator.from_spec(json.loads(header["generator"]))
        generator.to(tensors["dense.weight"].dtype).load_state_dict(tensors)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give an export, e.g. runs/NAME/export/generator.safetensors") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a generator export of this pipeline ({reason})") from None
    return _frozen(generator)


def generator_of(checkpoint: Checkpoint, weights: str) -> Generator:
    """The generator of a checkpoint, on the CPU in eval mode; `weights`: "ema" or "raw"."""
    prefix = "ema." if weights == "ema" else "generator."
    tensors = checkpoint.tensors()
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    generator = Generator.from_spec(checkpoint.progress["generator"])
    generator.to(own["dense.weight"].dtype).load_state_dict(own)
    return _frozen(generator)


def load_generator(path: Path, weights: str) -> Generator:
    """The generator of an export, of a Keras notebook's .h5, of a checkpoint's folder, or of a run's folder (its newest
    intact checkpoint), on the CPU in eval mode. `weights`, "ema" or "raw", chooses among a checkpoint's.

    Raises:
        UserError: it is none of these, or damaged.
    """
    if not path.is_dir():
        return _frozen(load_keras(path)) if path.suffix in KERAS_SUFFIXES else load_export(path)
    if (path / "checkpoints").is_dir():
        return generator_of(find(path), weights)
    checkpoint = read_checkpoint(path)
    checkpoint.verify()
    return generator_of(checkpoint, weights)


def _frozen(generator: Generator) -> Generator:
    return generator.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def save_onnx(generator: Generator, path: Path) -> None:
    """Writes the generator as ONNX, float32, atomically. n, the batch, is free.

    Inputs: `latents` float32 (n, latent_dim), entries in [-1, 1]; with classes also `labels` int64 (n,) in
    [0, num_classes). Output: `images` float32 (n, C, H, W), pixels in [0, 1].

    Raises:
        UserError: the packages that write ONNX are not installed.
    """
    # Two rows, as torch.export takes a length of one for a constant.
    inputs = {"latents": torch.zeros(2, generator.config.latent_dim)}
    if generator.num_classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.int64)
    try:
        program = torch.onnx.export(
            deepcopy(generator).float().cpu(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["images"],
            # The second input's length is found equal to the first's; naming it again would warn.
            dynamic_shapes=({0: "n"}, {0: torch.export.Dim.DYNAMIC})[: len(inputs)],
            dynamo=True,
            verbose=False,
        )
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: ONNX needs the package {error.name!r}: pip install 'gan-pipeline[onnx]'") from None
    assert program is not None  # with dynamo=True
    with replacing(path) as temporary:
        program.save(temporary)


# -- the command -------------------------------------------------------------------------------------------------------


def convert(source: Path, out: Path, weights: Literal["ema", "raw"] = "ema") -> int:
    """Writes a generator as a safetensors export or as ONNX.

    Args:
        source: An export, a Keras notebook's .h5, a checkpoint or a run's folder.
        out: The .safetensors or .onnx file to write; it must not exist.
        weights: Which weights of a checkpoint.
    """
    if out.suffix not in {".safetensors", ".onnx"}:
        raise UserError(f"{out}: unknown kind of file, name it .safetensors or .onnx")
    if out.exists():
        raise UserError(f"{out}: exists already, name another file")
    generator = load_generator(source, weights)
    if out.suffix == ".onnx":
        save_onnx(generator, out)
    else:
        save_export(generator, out, {"source": source.name})
    print(out)
    return 0


if __name__ == "__main__":
    run_entry(lambda: auto_cli(convert, as_positional=True))
