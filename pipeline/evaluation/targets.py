"""What `evaluate.py` is pointed at: a run, an exported generator, images that lie in files, or a real split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Remarks
from pipeline.data.images import open_images
from pipeline.data.resident import load_split
from pipeline.errors import UserError
from pipeline.evaluation import TARGET
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.scorer import Scorer
from pipeline.export.generator_file import EXPORT_SUFFIXES, HUB_WEIGHTS, critic_of, generator_of, load_generator
from pipeline.reporting.page import write_report
from pipeline.reporting.read import number
from pipeline.storage.checkpoint import CheckpointError, committed, find
from pipeline.storage.run_folder import RunFolder, scores_of, step_of


def score_target(
    target: Path,
    scorer: Scorer,
    steps: Sequence[int | None] | None,
    out: Path | None,
    root: Path,
    code: str | None = None,
    crop: int | None = None,
    size: int | None = None,
) -> list[dict[str, Any]]:
    """Scores `target`, which is a TARGET, into `out` (by default into the run, or under `root`), tells and returns what
    was written.

    Args:
        steps: the checkpoints of a run to score; None is the newest intact one. Without a list it is all of them, and
            those that are damaged are told and left out.
        root: the folder of all runs.
        code: see `read_generator`.
        crop, size: see `decode_image`; only of images in files.

    Raises:
        UserError: it is no TARGET or damaged, it does not suit the dataset, or what is to be written to holds scores of
            other images.
        Preempted: a signal came.
    """
    runtime, dataset = scorer.runtime, scorer.dataset
    is_run = RunFolder(target).has_begun
    is_export = target.suffix in EXPORT_SUFFIXES or (target / HUB_WEIGHTS).is_file()
    if (crop or size) and (is_run or is_export or not target.exists()):
        raise UserError(f"{target}: --crop and --size are for images in a folder or an .npz file: leave them out")
    if is_run:
        return _score_run(RunFolder(target), scorer, steps, out, code)
    facts: dict[str, Any] = {"target": str(target)}
    if is_export:
        path = out or scores_of(target, root)
        generator = load_generator(target, scorer.config.weights, code).to(runtime.device)
        result = scorer.score_generator(generator, path, facts)
    elif target.exists():
        path, remarks = out or scores_of(target, root), Remarks()
        split = open_images(target, dataset, remarks, crop=crop, size=size)
        if remarks:
            runtime.print(f"{target}: {remarks}")
        facts |= {key: value for key, value in (("crop", crop), ("size", size)) if value is not None}
        facts["images_fingerprint"] = runtime.ranks.on_main(lambda: _fingerprint(target, split.files, crop, size))

        def render(start: int, stop: int) -> Tensor:
            return torch.from_numpy(split.read(np.arange(start, stop)))

        asked = None if split.labels is None else torch.from_numpy(split.labels)
        result = scorer.score(ImageSet(split.num_images, render, asked), path, facts)
    elif str(target) in dataset.splits:
        path = out or scores_of(Path(f"{dataset.name}-{target}"), root)
        tensor, labels = load_split(dataset, str(target))
        facts["images_fingerprint"] = sha256(f"{dataset.fingerprint} {target}".encode()).hexdigest()
        result = scorer.score(ImageSet.of_tensor(tensor, labels if dataset.num_classes else None), path, facts)
    else:
        raise UserError(f"{target}: there is nothing of that name; give {TARGET}")
    runtime.print(f"{path}: {_summary(result)}")
    return [result]


def _score_run(
    run: RunFolder, scorer: Scorer, steps: Sequence[int | None] | None, out: Path | None, code: str | None
) -> list[dict[str, Any]]:
    weights, runtime, dataset, results = scorer.config.weights, scorer.runtime, scorer.dataset, list[dict[str, Any]]()
    is_its_own = runtime.ranks.on_main(lambda: run.dataset_fingerprint) in (None, dataset.fingerprint)
    if out is None and not is_its_own:
        raise UserError(
            f"{run.path}: was not trained on this dataset ({dataset.folder}): name a file for the scores with --out"
        )
    found: list[int | None] = [step_of(folder) for folder in runtime.ranks.on_main(lambda: committed(run))]
    for step in steps or found or [None]:
        try:
            checkpoint = runtime.ranks.on_main(partial(find, run, step))
        except CheckpointError as error:
            if steps or not found:
                raise
            runtime.print(f"skipped: {error}")
            continue
        generator = generator_of(checkpoint, weights, code).to(runtime.device)
        facts = {"step": checkpoint.step, "weights": weights}
        critic = critic_of(checkpoint) if is_its_own else None
        path, critic = out or run.scores(checkpoint.step), critic and critic.to(runtime.device)
        results.append(scorer.score_generator(generator, path, facts, critic))
        runtime.print(f"step {checkpoint.step}: {_summary(results[-1])}")
    if out is None:
        runtime.print(f"report: {runtime.ranks.on_main(lambda: write_report(run.path))}")
    return results


def _fingerprint(target: Path, files: Sequence[Path], crop: int | None, size: int | None) -> str:
    """SHA-256 of the files' names below `target`, of every byte in them, and of how they are cropped and resized."""
    digest = sha256(f"{crop} {size}\n".encode() if crop or size else b"")
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(target)} {file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _summary(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} FID {scores['fid']:.2f} (floor {number(scores['fid_floor'])}), IS {number(scores['is_mean'])}"
        for name, scores in result["features"].items()
    )
