"""A trained generator as a folder for the Hugging Face Hub: weights, config.json, a model card, scores and samples.

The folder tells what made the weights and how they score, but no path and no machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

from pipeline.config import read_yaml
from pipeline.errors import UserError
from pipeline.export.generator_file import CLASS_NAMES, FORMAT, HUB_WEIGHTS, fingerprint, save_export
from pipeline.export.images import row_names, sample_grid, save_grid
from pipeline.models.networks import AnyGenerator
from pipeline.reporting import code, number
from pipeline.reporting.read import Evaluation, Run, read_run
from pipeline.storage.files import new_folder, write_text
from pipeline.storage.run_folder import RunFolder

TASK = "unconditional-image-generation"
DATA_LICENCES = dict.fromkeys(
    ("mnist", "stacked_mnist"), "Creative Commons Attribution-Share Alike 3.0; © Yann LeCun and Corinna Cortes"
)
"""The licences of datasets that a run can name without a folder."""
SCORES = {"fid": "FID", "is_mean": "Inception Score", "kid_mean": "KID", "precision": "precision", "recall": "recall"}
"""The scores in the card's metadata, with their titles there."""
HTTP_ERRORS = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError, ValueError))
"""The errors of a request. The bases of the Hub's own error are those of its HTTP client, which differs by version."""


def write_hub_folder(
    generator: AnyGenerator,
    provenance: dict[str, Any],
    source: Path,
    out: Path,
    licence: str | None = None,
    data_licence: str | None = None,
) -> None:
    """Writes the folder `out`, which must not exist, whole or not at all.

    Args:
        provenance: The facts that `read_generator` returns with the generator.
        source: Where the generator was read. If that is a run's folder, or an export or a checkpoint in one, the run's
            settings, and its scores of this very generator, go along.
        licence: The licence of the weights, one of the Hub's identifiers, such as mit; None: the card names none.
        data_licence: The licence of the training images, in words; None: MNIST's, or not stated.
    """
    run, key = _run_of(source), fingerprint(generator)
    evaluations = [item for item in run.evaluations if item.settings.get("images_fingerprint") == key] if run else []
    evaluation = evaluations[-1] if evaluations else None
    settings = read_yaml(run.folder.config) if run and run.config else {}
    config = {"library_name": "gan-pipeline", "format": FORMAT, "generator": generator.spec()}
    config |= {name: settings[name] for name in ("network", "training") if name in settings}
    config |= {CLASS_NAMES: list(generator.class_names)} if generator.class_names else {}
    seed = run.config.get("training.seed") if run else 0
    with new_folder(out) as folder:
        save_export(generator, folder / HUB_WEIGHTS, provenance)
        write_text(folder / "config.json", json.dumps(config | {"provenance": provenance}, indent=1))
        images, columns = sample_grid(generator, seed if isinstance(seed, int) else 0)
        save_grid(images, folder / "samples.png", columns)
        if evaluation is not None:
            scores = {"step": evaluation.step, **evaluation.settings, "features": evaluation.features}
            write_text(folder / "scores.json", json.dumps(scores, indent=1))
        _card(generator, provenance, run, evaluation, licence, data_licence).save(folder / "README.md")


def download(path: Path) -> Path:
    """Returns the export of `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`, a model repository of the Hub (or of the
    server in HF_ENDPOINT). It lies in the Hub's cache on this machine, and is fetched if it is not there.

    Raises:
        UserError: There is none, or it can't be fetched.
    """
    name, _, revision = "/".join(path.parts[1:]).partition("@")
    try:
        return Path(hf_hub_download(name, HUB_WEIGHTS, revision=revision or None))
    except HTTP_ERRORS as error:
        fix = f"it takes a repository with {HUB_WEIGHTS}, and a private one `hf auth login`"
        raise UserError(f"hf://{name}: {_reason(error)}; {fix}") from None


def check_push(name: str) -> None:
    """Raises UserError if the Hub does not accept this name for a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push is {name!r}: {str(error).splitlines()[0]}") from None


def push(folder: Path, name: str) -> str:
    """Uploads the folder's files to the model repository `name` of the Hub (or of the server in HF_ENDPOINT), as a
    commit. A repository that does not exist is made. Returns its address.

    Raises:
        UserError: The upload failed. The folder stays.
    """
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload of gan-pipeline")
    except HTTP_ERRORS as error:
        fix = f"{folder} is written: after `hf auth login`, `hf upload {name} {folder}` sends it"
        raise UserError(f"--push {name}: {_reason(error)}; {fix}") from None
    return str(repository)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _run_of(source: Path) -> Run | None:
    """Returns the run whose folder `source` is, or holds that export or checkpoint."""
    folder, above = source.resolve().parent, RunFolder(source.resolve().parent.parent)
    run = above if folder in (above.export.parent, above.checkpoints) else RunFolder(source)
    return read_run(run.path) if run.has_begun else None


def _card(
    generator: AnyGenerator,
    provenance: dict[str, Any],
    run: Run | None,
    evaluation: Evaluation | None,
    licence: str | None,
    data_licence: str | None,
) -> ModelCard:
    name = str(provenance.get("run") or (run.name if run else "generator"))
    dataset = str((run.environment.get("dataset") if run else None) or "images that are not named")
    objective = str(run.config.get("training.objective", "gan")) if run else "gan"
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=str(evaluation.settings.get("reference", "train")),
            metric_type=key.removesuffix("_mean"),
            metric_name=f"{title} ({features} features)",
            metric_value=value,
        )
        for features in (evaluation.features if evaluation else ())
        for key, title in SCORES.items()
        if evaluation and (value := evaluation.score(features, key)) is not None
    ]
    data = ModelCardData(
        license=licence,
        library_name="gan-pipeline",
        pipeline_tag=TASK,
        tags=sorted({"gan", objective.partition(":")[0], "image-generation"}),
        model_name=name if results else None,
        eval_results=results or None,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=name,
        shape=generator.image_shape,
        num_classes=generator.num_classes,
        rows=", ".join(map(code, row_names(generator))),
        dataset=code(dataset),
        objective=code(objective),
        step=provenance.get("step"),
        evaluation=evaluation,
        fingerprint=code(str(provenance.get("dataset") or "not told")),
        data_licence=data_licence or (DATA_LICENCES.get(str(run.config.get("data.dataset"))) if run else None),
        number=number,
    )
    return card
