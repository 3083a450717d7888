"""A trained generator as ONNX, which runs without this pipeline and without torch."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path

import torch

from pipeline.errors import UserError, describe_error
from pipeline.export.generator_file import CLASS_NAMES
from pipeline.models.networks import AnyGenerator
from pipeline.storage.files import replacing


def save_onnx(generator: AnyGenerator, path: Path) -> None:
    """Writes the generator as ONNX, float32, atomically. n, the batch, is free.

    Inputs: `latents` float32 (n, latent_dim), entries in [-1, 1]; with classes also `labels` int64 (n,) in
    [0, num_classes), whose names are a JSON list in the model's metadata. Output: `images` float32 (n, C, H, W), pixels
    in [0, 1], not mirrored.

    Raises:
        UserError: the packages that write ONNX are not installed, or code of the user's can't be written so.
    """
    unmirrored = deepcopy(generator).float().cpu()
    unmirrored.register_forward_hook(lambda module, inputs, images: images.flip(2, 3))
    # Two rows, as torch.export takes a length of one for a constant.
    inputs = {"latents": torch.zeros(2, generator.config.latent_dim)}
    if generator.num_classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.int64)
    try:
        with warnings.catch_warnings():
            # torch 2.11 deprecates what its own exporter does.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program = torch.onnx.export(
                unmirrored,
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
    except torch.onnx.OnnxExporterError as error:  # code of the user's may do what no graph can
        raise UserError(f"{path}: torch can't write this network as ONNX ({describe_error(error)})") from error
    assert program is not None  # with dynamo=True
    if generator.class_names:
        program.model.metadata_props[CLASS_NAMES] = json.dumps(generator.class_names)
    with replacing(path) as temporary:
        program.save(temporary)
