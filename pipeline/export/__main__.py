"""Converts a trained generator, `python -m pipeline.export SOURCE FILE`, or publishes it, `... SOURCE FOLDER/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from pipeline.config import Parser
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError

SUFFIXES = ("", ".safetensors", ".onnx", ".h5", ".png", ".webp", ".apng")


@dataclass(frozen=True)
class NetworkCode:
    """A network of the user's own.

    Args:
        generator: module:NAME of the generator's code, if it is not one of the package's.
    """

    generator: str | None = None


def convert(
    source: Path,
    out: Path,
    weights: Literal["ema", "raw"] = "ema",
    network: NetworkCode = NetworkCode(),
    push: str | None = None,
    licence: str | None = None,
    data_licence: str | None = None,
    picture: Literal["grid", "interpolation"] = "grid",
) -> int:
    """Writes a trained generator into a file of another format or a folder for the Hugging Face Hub, or its images.

    Formats are safetensors, ONNX and the whole-model .h5 of Keras notebooks. The folder for the Hub holds the weights,
    config.json, a model card, scores and samples. A .png is a picture of generated images; a .webp or .apng shows a
    run's samples, from the first to the last, as an animation.

    Args:
        source: An export, hf://OWNER/NAME, a Keras notebook's .h5 or .keras, a checkpoint or a run's folder.
        out: The file or else the folder to write, which must not exist; hf://OWNER/NAME is the folder NAME, sent there.
        weights: Weights of a checkpoint to take: their moving average, or the trained ones.
        network: Code of the generator.
        push: Send the folder to this model repository of the Hub, OWNER/NAME (takes the login of `hf auth login`).
        licence: Licence of the weights for the model card, as the Hub names it, such as mit.
        data_licence: Licence of the training images for the model card, in words.
        picture: What a .png shows: a grid of images, or lines between latents.
    """
    suffix = out.suffix
    if out.parts[:1] == ("hf:",):
        push, out, suffix = "/".join(out.parts[1:]), Path(out.name), ""
    if suffix not in SUFFIXES:
        kinds = f"{', '.join(SUFFIXES[1:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"{out}: unknown kind of file, name it {kinds}, or a folder without a suffix")
    if suffix and (push or licence or data_licence):
        raise UserError(
            f"{out} is a file: --push, --licence and --data_licence go with a folder, a name without suffix"
        )
    if out.exists():
        raise UserError(f"{out}: exists already, name another {'file' if suffix else 'folder'}")

    # Imported here, so that mistakes need no torch.
    from pipeline.export.generator_file import read_generator, save_export, save_onnx
    from pipeline.export.images import save_animation, save_picture

    if suffix in (".webp", ".apng"):
        save_animation(source, out)
        print(out)
        return 0
    if not suffix:
        from pipeline.export import hub

        if push is not None:
            hub.check_push(push)
    generator, facts = read_generator(source, weights, network.generator)
    facts |= {"source": source.name}
    match suffix:
        case ".safetensors":
            save_export(generator, out, facts)
        case ".onnx":
            save_onnx(generator, out)
        case ".png":
            save_picture(generator, out, is_strip=picture == "interpolation")
        case ".h5":
            from pipeline.export.keras_files import save_keras

            save_keras(generator, out)
        case _:
            hub.write_hub_folder(generator, facts, source, out, licence, data_licence)
    print(out)
    if push is not None:
        print(hub.push(out, push))
    return 0


if __name__ == "__main__":
    run_program(lambda: auto_cli(convert, prog="gan-pipeline export", parser_class=Parser))
