"""A trained generator as a folder of the Hugging Face Hub: weights, config.json, a model card, scores and samples.

The card's metadata are the Hub's: YAML before the text, with a model-index of the scores. Of the run only what made
the weights is told: no paths, no machine.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.export.generator_file import CLASS_NAMES, FORMAT, HUB_WEIGHTS, fingerprint, save_export
from pipeline.export.images import row_names, sample_grid, save_grid
from pipeline.models.networks import AnyGenerator
from pipeline.reporting.formatting import code, number
from pipeline.reporting.read import Evaluation, Run, read_run
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder

CARD, CONFIG, SCORES, SAMPLES = "README.md", "config.json", "scores.json", "samples.png"
TASK = "unconditional-image-generation"
DATA_LICENCES = {"mnist": "Creative Commons Attribution-Share Alike 3.0; © Yann LeCun and Corinna Cortes"}
"""Of the datasets that a run can name without a folder."""
TOLD = ("network", "training")
"""Sections of settings that made the weights."""


def write_hub_folder(
    generator: AnyGenerator,
    provenance: Mapping[str, Any],
    source: Path,
    out: Path,
    licence: str | None = None,
    data_licence: str | None = None,
) -> None:
    """Writes the folder `out`, which must not exist, whole or not at all.

    Args:
        provenance: of `read_generator`, as the source is: a run's folder, or an export or checkpoint within one, whose
            settings and scores of this very generator go along.
        licence: of the weights, one of the Hub's identifiers, such as mit; None: the card names none.
        data_licence: of the images that it was trained on, in words; None: that of MNIST, or not stated.
    """
    run = _run_of(source)
    evaluation = _scores_of(run, generator)
    seed = run.config.get("training.seed", 0) if run else 0
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, temporary)
        save_export(generator, temporary / HUB_WEIGHTS, dict(provenance))
        config = {"library_name": "gan-pipeline", "format": FORMAT, "generator": generator.spec(), **_settings(run)}
        config |= {CLASS_NAMES: list(generator.class_names)} if generator.class_names else {}
        write_text(temporary / CONFIG, json.dumps(config | {"provenance": dict(provenance)}, indent=1))
        images, columns = sample_grid(generator, seed if isinstance(seed, int) else 0)
        save_grid(images, temporary / SAMPLES, columns)
        if evaluation is not None:
            scores = {"step": evaluation.step, **evaluation.settings, "features": evaluation.features}
            write_text(temporary / SCORES, json.dumps(scores, indent=1))
        write_text(temporary / CARD, _card(generator, provenance, run, evaluation, licence, data_licence))
        temporary.rename(out)
        undo.pop_all()


def check_push(name: str) -> None:
    """Raises UserError where nothing could be sent: a name that the Hub does not take, or its package is missing."""
    if find_spec("huggingface_hub") is None:
        raise UserError("--push takes huggingface_hub: pip install 'gan-pipeline[hub]'")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push is {name!r}: {str(error).splitlines()[0]}") from None


def push(folder: Path, name: str) -> str:
    """Sends the folder's files to the model repository `name` of the Hub (or what HF_ENDPOINT names), which is made if
    it is not there; a commit on top of what is. Returns its address.

    Raises:
        UserError: it was not taken. The folder stays.
    """
    from httpx import HTTPError  # huggingface_hub's own errors are its children
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload of gan-pipeline")
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push {name}: {reason}; {folder} is written: after `hf auth login`, `hf upload {name} {folder}` sends it"
        ) from None
    return str(repository)


def _run_of(source: Path) -> Run | None:
    """The run that a run's folder, an export in it or one of its checkpoints is of."""
    above = RunFolder(source.resolve().parent.parent)
    within = source.resolve().parent in (above.export.parent, above.checkpoints)
    run = above if within else RunFolder(source)
    return read_run(run.path) if run.has_begun else None


def _scores_of(run: Run | None, generator: AnyGenerator) -> Evaluation | None:
    """The newest evaluation of this very generator."""
    own = fingerprint(generator)
    known = reversed(run.evaluations if run else [])
    return next((item for item in known if item.settings.get("images_fingerprint") == own), None)


def _settings(run: Run | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in (run.config if run else {}).items():
        section, *middle, last = key.split(".")
        if section in TOLD:
            place = found.setdefault(section, {})
            for name in middle:
                place = place.setdefault(name, {})
            place[last] = value
    return found


def _card(
    generator: AnyGenerator,
    provenance: Mapping[str, Any],
    run: Run | None,
    evaluation: Evaluation | None,
    licence: str | None,
    data_licence: str | None,
) -> str:
    name = str(provenance.get("run") or (run.name if run else "generator"))
    dataset = str((run.environment.get("dataset") if run else None) or "images that are not named")
    known = DATA_LICENCES.get(str(run.config.get("data.dataset"))) if run else None
    objective = str(run.config.get("training.objective", "gan")) if run else "gan"
    metadata = {
        **({"license": licence} if licence else {}),
        "library_name": "gan-pipeline",
        "pipeline_tag": TASK,
        "tags": sorted({"gan", objective.partition(":")[0], "image-generation"}),
        **({"model-index": [_model_index(name, dataset, evaluation)]} if evaluation else {}),
    }
    channels, height, width = generator.image_shape
    rows = ", ".join(map(code, row_names(generator)))
    lines = [
        f"# {name}",
        "",
        f"A generator of {height} x {width} images ({channels} channel{'s' if channels > 1 else ''}"
        f"{f', {generator.num_classes} classes' if generator.num_classes else ''}), trained on {code(dataset)} with "
        f"the objective {code(objective)}{_steps(provenance)}.",
        "",
        f"![samples]({SAMPLES})",
        "",
        *([f"Rows, from the top: {rows}.", ""] if rows else []),
        *_score_table(evaluation),
        "## Use",
        "",
        "```python",
        "from pipeline import load_generator, render_range",
        "",
        'generator = load_generator("FOLDER")  # this folder, downloaded',
        f"images = render_range(generator, seed=0, start=0, stop=16)  # uint8 (16, {channels}, {height}, {width})",
        "```",
        "",
        f"{CONFIG} has the network and the settings of the training.",
        "",
        "## Data",
        "",
        f"Trained on {code(dataset)} (fingerprint {code(str(provenance.get('dataset') or 'not told'))}). Licence of "
        f"the data: {data_licence or known or 'not stated'}.",
        "",
    ]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines)


def _steps(provenance: Mapping[str, Any]) -> str:
    step = provenance.get("step")
    return f" for {step:,} steps" if isinstance(step, int) else ""


def _model_index(name: str, dataset: str, evaluation: Evaluation) -> dict[str, Any]:
    kinds = {
        "fid": "FID",
        "is_mean": "Inception Score",
        "kid_mean": "KID",
        "precision": "precision",
        "recall": "recall",
    }
    metrics = [
        {"type": key.removesuffix("_mean"), "name": f"{title} ({features} features)", "value": value}
        for features in evaluation.features
        for key, title in kinds.items()
        if (value := evaluation.score(features, key)) is not None
    ]
    split = str(evaluation.settings.get("reference", "train"))
    data = {"name": dataset, "type": dataset, "split": split}
    return {"name": name, "results": [{"task": {"type": TASK}, "dataset": data, "metrics": metrics}]}


def _score_table(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["Not scored.", ""]
    columns = {"FID": "fid", "floor": "fid_floor", "IS": "is_mean", "KID": "kid_mean"}
    rows = [
        f"| {features} | {' | '.join(number(evaluation.score(features, key)) for key in columns.values())} |"
        for features in evaluation.features
    ]
    return [
        f"| features | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *rows,
        "",
        f"Of {number(evaluation.settings.get('num_images'))} images against the "
        f"{evaluation.settings.get('reference')} split; the floor is what real images of the other split score. Scores "
        f"of two feature spaces do not compare. All of them: {SCORES}.",
        "",
    ]
