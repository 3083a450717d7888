"""Converts a trained generator: `python -m pipeline.export SOURCE FILE`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.export.generator_file import read_generator, save_export
from pipeline.export.onnx import save_onnx


@dataclass(frozen=True)
class NetworkCode:
    generator: str | None = None
    """module:NAME of the code that the generator takes, if it is a network of its user's own."""


def convert(
    source: Path, out: Path, weights: Literal["ema", "raw"] = "ema", network: NetworkCode = NetworkCode()
) -> int:
    """Writes a generator as a safetensors export, as ONNX, or as the Keras notebooks' whole-model .h5.

    Args:
        source: An export, a Keras notebook's .h5, a checkpoint or a run's folder.
        out: The .safetensors, .onnx or .h5 file to write; it must not exist.
        weights: Which weights of a checkpoint.
        network: The user's own.
    """
    if out.suffix not in {".safetensors", ".onnx", ".h5"}:
        raise UserError(f"{out}: unknown kind of file, name it .safetensors, .onnx or .h5")
    if out.exists():
        raise UserError(f"{out}: exists already, name another file")
    generator, provenance = read_generator(source, weights, network.generator)
    if out.suffix == ".onnx":
        save_onnx(generator, out)
    elif out.suffix == ".h5":
        from pipeline.export.keras_save import save_keras  # h5py is for these files alone

        save_keras(generator, out)
    else:
        save_export(generator, out, provenance | {"source": source.name})
    print(out)
    return 0


if __name__ == "__main__":
    run_program(lambda: auto_cli(convert, as_positional=True, prog="python -m pipeline.export"))
