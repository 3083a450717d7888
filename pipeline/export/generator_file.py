"""A trained generator as one file: safetensors, which is read back, and ONNX, which runs without this package or torch.

Also the networks of checkpoints, and `read_generator`, which takes a generator from whatever holds one.
"""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import NetworkConfig
from pipeline.errors import UserError, describe_error
from pipeline.models.networks import AnyGenerator, Critic, Generator, generator_of_spec, preserve_global_rng
from pipeline.models.spectral_norm import has_spectral_norm, use_spectral_norm
from pipeline.storage.checkpoint import Checkpoint, find, read_checkpoint, sha256_of_tensor, under
from pipeline.storage.files import near, read_tensors, replacing, write_tensors
from pipeline.storage.run_folder import MANIFEST, RunFolder

FORMAT = "gan-pipeline generator 2"
"""The format that is written: weights as the networks hold them, mirrored."""
KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
EXPORT_SUFFIXES = (".safetensors", *KERAS_SUFFIXES)
"""The suffixes of single files that `load_generator` reads; its other sources are folders."""
CLASS_NAMES = "class_names"
"""The key of the classes' names, a JSON list, in an export's header, a checkpoint's progress and ONNX's metadata. Files
of earlier versions have none."""
PROJECTS = "projects"
"""The key in a checkpoint's progress of whether its critic scores images as those of a class (`Objective.projects`)."""
HUB_WEIGHTS = "model.safetensors"
"""The name of an export within a folder for the Hugging Face Hub."""


def is_export(path: Path) -> bool:
    """Returns whether `load_generator` finds a single generator there: in a file, a folder for the Hub, or the Hub."""
    return path.suffix in EXPORT_SUFFIXES or path.parts[:1] == ("hf:",) or (path / HUB_WEIGHTS).is_file()


# -- writing -----------------------------------------------------------------------------------------------------------


def save_export(generator: AnyGenerator, path: Path, provenance: dict[str, Any]) -> None:
    """Writes the generator's weights and moving statistics, atomically, with what rebuilds it in the header.

    Args:
        provenance: JSON-serialisable facts for the header (run, step, dataset's fingerprint).
    """
    header = {"format": FORMAT, "generator": json.dumps(generator.spec()), "provenance": json.dumps(provenance)}
    if generator.class_names:
        header[CLASS_NAMES] = json.dumps(generator.class_names)
    state = generator.state_dict()
    # Copies: safetensors has no strides, and no two names for one tensor, as a user's network may have.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    write_tensors(path, tensors, header)


def save_onnx(generator: AnyGenerator, path: Path) -> None:
    """Writes the generator as ONNX in float32, atomically. The batch size n is free.

    The inputs are `latents` float32 (n, latent_dim) in [-1, 1] and, with classes, `labels` int64 (n,) in
    [0, num_classes); the classes' names are a JSON list in the metadata. The output is `images` float32 (n, C, H, W)
    with pixels in [0, 1], not mirrored.

    Raises:
        UserError: The packages that write ONNX are not installed, or a user's network can't be expressed in it.
    """
    unmirrored = deepcopy(generator).float().cpu()
    unmirrored.register_forward_hook(lambda module, inputs, images: images.flip(2, 3))
    # Two rows, because torch.export takes a length of one for a constant.
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
                # The export finds the second input's length equal to the first's; naming it again would warn.
                dynamic_shapes=({0: "n"}, {0: torch.export.Dim.DYNAMIC})[: len(inputs)],
                dynamo=True,
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: ONNX needs the package {error.name!r}: pip install 'gan-pipeline[onnx]'") from None
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"{path}: torch can't write this network as ONNX ({describe_error(error)})") from error
    assert program is not None  # with dynamo=True
    if generator.class_names:
        program.model.metadata_props[CLASS_NAMES] = json.dumps(generator.class_names)
    with replacing(path) as temporary:
        program.save(temporary)


# -- reading -----------------------------------------------------------------------------------------------------------


def load_generator(path: str | Path, weights: str = "ema", code: str | None = None) -> AnyGenerator:
    """Returns the generator alone of `read_generator`: latents (n, latent_dim) -> mirrored images (n, C, H, W) in
    [0, 1], which `render_range` and `render` of pipeline/export/images.py turn into uint8 ones, the right way round."""
    return read_generator(Path(path), weights, code)[0]


def read_generator(path: Path, weights: str, code: str | None = None) -> tuple[AnyGenerator, dict[str, Any]]:
    """Returns the generator that a file or folder holds, on the CPU in eval mode, and where it comes from.

    Args:
        path: An export, a folder for the Hugging Face Hub, hf://OWNER/NAME (@REVISION may follow) for one there, a
            Keras notebook's .h5 or .keras, a checkpoint's folder, or a run's folder: then its newest intact checkpoint,
            and damaged newer ones are named in the log.
        weights: Which of a checkpoint's weights, "ema" or "raw".
        code: module:NAME of a user's own network. Files name theirs too, but only the caller may make the program
            import code.

    Returns:
        The generator, and facts: of a checkpoint "step" and "weights", within a run's folder also "run" and "dataset"
        (its fingerprint, or None if the run does not hold it); of an export what its header says.

    Raises:
        UserError: It is none of these, damaged, or needs code that the caller does not name.
    """
    if path.parts[:1] == ("hf:",):
        from pipeline.export.hub import download  # here: nothing else needs huggingface_hub

        return _read_export(download(path), code)
    if (path / HUB_WEIGHTS).is_file():
        return _read_export(path / HUB_WEIGHTS, code)
    if path.is_dir():
        checkpoint = _checkpoint_in(path)
        facts: dict[str, Any] = {"step": checkpoint.step, "weights": weights}
        if (run := RunFolder(checkpoint.folder.resolve().parent.parent)).has_begun:
            facts |= {"run": run.path.name, "dataset": run.dataset_fingerprint}
        return generator_of(checkpoint, weights, code), facts
    if path.suffix in KERAS_SUFFIXES:
        from pipeline.export.keras_files import load_keras  # here: nothing else needs h5py

        return _freeze(load_keras(path)), {}
    return _read_export(path, code)


def warm_start(source: str, generator: AnyGenerator, ema: AnyGenerator, critic: nn.Module) -> str:
    """Gives networks that were not trained yet the weights of `source` (see `read_generator`), for `run.start_from`. A
    checkpoint's go to each of the three; a single generator's to generator and average, and the critic stays. Returns a
    line that says so.

    Raises:
        UserError: It holds no generator, or does not fit the networks.
    """
    path, networks = Path(source), {"generator": generator, "ema": ema, "critic": critic}
    if path.is_dir() and not is_export(path):
        checkpoint = _checkpoint_in(path)
        there, tensors = checkpoint.progress["generator"], checkpoint.tensors()
        states = {role: under(tensors, role) for role in networks}
    else:
        loaded = load_generator(path, code=generator.config.generator)
        there, states = loaded.spec(), dict.fromkeys(("generator", "ema"), loaded.state_dict())
    for role, state in states.items():
        try:
            networks[role].load_state_dict(state)
        except RuntimeError as error:
            different = [(key, there.get(key), value) for key, value in generator.spec().items()]
            reasons = [f"{key} is {old} there and {new} here" for key, old, new in different if old != new]
            was, is_now = has_spectral_norm(state), has_spectral_norm(networks[role].state_dict())
            if was != is_now:
                reasons.append(f"training.spectral_norm is {was} there and {is_now} here".lower())
            reason = "; ".join(reasons) or str(error).splitlines()[-1].strip("\t .")
            raise UserError(
                f"run.start_from is {source}: its {role} does not fit this run's ({reason}): give one with the same "
                "networks, objective and images, or for another critic an export, which has none"
            ) from None
    return f"begins with the weights of {source}: {', '.join(states)}"


def _checkpoint_in(path: Path) -> Checkpoint:
    """Returns a run's newest intact checkpoint, or the one that the folder is."""
    run = RunFolder(path)
    if run.has_begun:
        return find(run)
    if not (path / MANIFEST).exists():
        raise UserError(f"{path}: holds no run, checkpoint or export: give a run's folder, such as runs/NAME")
    return read_checkpoint(path).verify()


def generator_of(checkpoint: Checkpoint, weights: str, code: str | None = None) -> AnyGenerator:
    """Returns the generator of a checkpoint, on the CPU in eval mode; for the arguments see `read_generator`."""
    state = under(checkpoint.tensors(), "ema" if weights == "ema" else "generator")
    generator = generator_of_spec(checkpoint.progress["generator"], code, checkpoint.folder)
    return _load(generator, state, checkpoint.progress.get(CLASS_NAMES, []))


@preserve_global_rng
def critic_of(checkpoint: Checkpoint) -> Critic | None:
    """Returns the critic of a checkpoint, on the CPU; None if it is a user's own network, or if only its scores of
    images as those of a class mean something."""
    state = under(checkpoint.tensors(), "critic")
    biases = state.get("score.bias")
    if biases is None or checkpoint.progress.get(PROJECTS):
        return None
    spec = checkpoint.progress["generator"]
    config = NetworkConfig(latent_dim=spec["network"]["latent_dim"], width=spec["network"]["width"])
    critic = Critic(config, tuple(spec["image_shape"]), spec["num_classes"]).to(biases.dtype)
    if has_spectral_norm(state):
        use_spectral_norm(critic, torch.Generator())
    critic.load_state_dict(state)
    return critic.requires_grad_(False).to(memory_format=torch.channels_last)


def fingerprint(generator: AnyGenerator) -> str:
    """Returns the SHA-256 of all that the generator computes with. It is the same for the live network, its checkpoint
    and its export."""
    digest = sha256(json.dumps(generator.spec(), sort_keys=True).encode())
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sha256_of_tensor(tensor.cpu())}".encode())
    return digest.hexdigest()


def _read_export(path: Path, code: str | None) -> tuple[AnyGenerator, dict[str, Any]]:
    if path.suffix == ".onnx":
        raise UserError(f"{path}: ONNX is written, not read: give the run, or an export as .safetensors")
    try:
        tensors, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"its header does not say {FORMAT!r}")
        generator = generator_of_spec(json.loads(header["generator"]), code, path)
        names, provenance = json.loads(header.get(CLASS_NAMES, "[]")), json.loads(header.get("provenance", "{}"))
        return _load(generator, tensors, names), dict(provenance)
    except FileNotFoundError:
        advice = f"no such file or folder{near(path)}; give a run's folder, e.g. runs/NAME, or an export"
        raise UserError(f"{path}: {advice}") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a generator export of this pipeline ({reason})") from None


def _load(generator: AnyGenerator, tensors: dict[str, Tensor], class_names: object) -> AnyGenerator:
    """Gives a generator the weights, and their dtype, and the names of its classes that a file holds; returns it.

    Raises:
        ValueError, KeyError, RuntimeError: The file is damaged.
    """
    name, _ = next(generator.named_parameters())
    generator.to(tensors[name].dtype).load_state_dict(tensors)
    names: list[Any] = class_names if isinstance(class_names, list) else [None]
    if len(names) not in (0, generator.num_classes) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{CLASS_NAMES} is no list of the names of its {generator.num_classes} classes")
    generator.class_names = tuple(names)
    return _freeze(generator)


def _freeze(generator: AnyGenerator) -> AnyGenerator:
    generator.eval().requires_grad_(False)
    return generator.to(memory_format=torch.channels_last) if isinstance(generator, Generator) else generator
