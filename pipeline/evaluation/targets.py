"""The targets of `evaluate.py`: a run, an exported generator, images in files, or a real split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data import Dataset, open_dataset
from pipeline.data.dataset import Remarks
from pipeline.data.images import open_images
from pipeline.data.resident import load_split
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.evaluation import TARGET
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.scorer import Scorer, check_shape
from pipeline.export.generator_file import critic_of, generator_of, is_export, load_generator
from pipeline.reporting import counted, finite, number, percent
from pipeline.reporting.page import write_report
from pipeline.reporting.read import Evaluation, read_mapping
from pipeline.storage.checkpoint import CheckpointError, find, read_checkpoint
from pipeline.storage.files import make_folder, near
from pipeline.storage.run_folder import MANIFEST, RunFolder, scores_of, step_of


@contextmanager
def real_dataset(
    images: str | Path | None, config: Config, ranks: Ranks, kind: str, crop: int | None, size: int | None
) -> Iterator[Dataset]:
    """Yields the dataset to compare with: the configured one, or without one `images`, a folder or an .npz file, which
    is a dataset beside the runs until the block ends; messages name `images` instead. Every rank must call it. Raises
    UserError."""
    if images is None:
        yield ranks.on_main(lambda: open_dataset(config.data))
        return
    if "own" in config.evaluation.features:
        raise UserError(
            f"the 'own' features are those of a prepared dataset with classes, and {images} is none: "
            "gan-pipeline evaluate FOLDER --data.dataset data/NAME scores in them"
        )
    from pipeline.data.prepare import prepare_folder, prepare_npz

    with ExitStack() as until_scored:

        def prepare() -> Dataset:
            make_folder(root := Path(config.run.root))
            folder = until_scored.enter_context(TemporaryDirectory(prefix=".real-", dir=root))
            write = prepare_npz if Path(images).is_file() else prepare_folder
            dataset = write(folder, "real", {"train": images}, crop=crop, size=size, kind=kind)
            return replace(dataset, name=str(images))

        dataset = ranks.on_main(prepare)
        try:
            yield dataset
        except UserError as error:
            raise type(error)(str(error).replace(str(dataset.folder), str(images))) from None


def check_run(run: RunFolder, dataset: Dataset) -> None:
    """Raises UserError if a run's newest checkpoint makes images of another shape than the dataset's. The features of
    the dataset are loaded after this, since what they lack would then be of no use."""
    with suppress(CheckpointError):  # which is told where it is scored
        for step in run.saved_steps()[-1:]:
            check_shape(read_checkpoint(run.checkpoint(step)).progress["generator"]["image_shape"], dataset)


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
    """Scores `target`, which is as TARGET describes, into `out` (by default a file in the run, or under `root`, the
    folder of all runs), prints a summary and returns what was written.

    Args:
        steps: The checkpoints of a run to score; None is the newest intact one. Without a list all are scored, and
            damaged ones are named and left out.
        code: See `read_generator`.
        crop, size: See `Resizing`; only for images in files.

    Raises:
        UserError: It is no TARGET, damaged, or does not suit the dataset; or `out` holds scores of other images.
        Preempted: A signal came.
    """
    runtime, dataset, run = scorer.runtime, scorer.dataset, RunFolder(target)
    resizing = {key: value for key, value in (("crop", crop), ("size", size)) if value is not None}
    if resizing and (run.has_begun or is_export(target) or not target.exists()):
        raise UserError(f"{target}: --crop and --size are for images in a folder or an .npz file: leave them out")
    place = target.resolve()
    if (step := step_of(place)) is not None and (place / MANIFEST).is_file():
        raise UserError(f"{target}: is a checkpoint: give its run, {place.parent.parent} --step {step}")
    if run.has_begun:
        return _score_run(run, scorer, steps, out, code)
    facts: dict[str, Any] = {"target": str(target).replace("hf:/", "hf://", 1), **resizing}
    path = out or scores_of(target, root)
    if is_export(target):
        generator = load_generator(target, scorer.config.weights, code).to(runtime.device)
        path = out or _beside_others(path, scorer)
        result = scorer.score_generator(generator, path, facts)
    elif target.is_dir() or (target.suffix == ".npz" and target.exists()):
        split = open_images(target, dataset, remarks := Remarks(), crop=crop, size=size)
        if remarks:
            runtime.print(f"{target}: {remarks}")
        facts["images_fingerprint"] = runtime.ranks.on_main(lambda: _fingerprint(target, split.files, crop, size))
        labels = None if split.labels is None else torch.from_numpy(split.labels)
        images = ImageSet(split.num_images, lambda *ends: torch.from_numpy(split.read(np.arange(*ends))), labels)
        result = scorer.score(images, path, facts)
    elif str(target) in dataset.splits:
        path = out or scores_of(Path(f"{dataset.name}-{target}"), root)
        tensor, classes = load_split(dataset, str(target))
        facts["images_fingerprint"] = sha256(f"{dataset.fingerprint} {target}".encode()).hexdigest()
        result = scorer.score(ImageSet.of_tensor(tensor, classes if dataset.num_classes else None), path, facts)
    else:
        what = "is none of what can be scored" if target.exists() else f"there is nothing of that name{near(target)}"
        raise UserError(f"{target}: {what}; give {TARGET}")
    runtime.print(f"{path}: {facts['target']} against {dataset.name}: {_summary(result)}")
    return [result]


def _score_run(
    run: RunFolder, scorer: Scorer, steps: Sequence[int | None] | None, out: Path | None, code: str | None
) -> list[dict[str, Any]]:
    weights, runtime, dataset, results = scorer.config.weights, scorer.runtime, scorer.dataset, list[dict[str, Any]]()
    is_trained_on_dataset = runtime.ranks.on_main(lambda: run.dataset_fingerprint) in (None, dataset.fingerprint)
    if out is None and not is_trained_on_dataset:
        raise UserError(
            f"{run.path}: was not trained on this dataset ({dataset.folder}): name a file for the scores with --out"
        )
    saved: list[int | None] = [*runtime.ranks.on_main(run.saved_steps)]
    for step in (saved or [None]) if steps is None else steps:
        try:
            checkpoint = runtime.ranks.on_main(partial(find, run, step))
        except CheckpointError as error:
            if steps is not None or not saved:
                raise
            runtime.print(f"skipped: {error}")
            continue
        generator = generator_of(checkpoint, weights, code).to(runtime.device)
        critic = critic_of(checkpoint) if is_trained_on_dataset else None
        path = out or _beside_others(run.scores(checkpoint.step), scorer)
        facts = {"step": checkpoint.step, "weights": weights}
        results.append(scorer.score_generator(generator, path, facts, critic and critic.to(runtime.device)))
        runtime.print(f"step {checkpoint.step}: {_summary(results[-1])}")
    if out is None:
        runtime.print(f"report: {runtime.ranks.on_main(lambda: write_report(run.path))}")
    return results


def _beside_others(path: Path, scorer: Scorer) -> Path:
    """Returns `path`, or, if that holds scores of another number of images, a file in a folder for this number."""
    count = scorer.config.num_images
    before = scorer.runtime.ranks.on_main(lambda: finite(read_mapping(path, []).get("num_images")))
    if before in (None, count):
        return path
    other = path.parent / f"{count}-images" / path.name
    scorer.runtime.print(f"{path} has the scores of {before:,.0f} images: those of {count:,} go to {other}")
    return other


def _fingerprint(target: Path, files: Sequence[Path], crop: int | None, size: int | None) -> str:
    """Returns the SHA-256 of the files' names below `target`, of their bytes, `crop` and `size`."""
    digest = sha256(f"{crop} {size}\n".encode() if crop or size else b"")
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(target)} {file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _summary(result: dict[str, Any]) -> str:
    evaluation, texts = Evaluation(0, result, result["features"]), []
    for name, scores in result["features"].items():
        texts.append(f"{name} FID {scores['fid']:.2f} ({evaluation.floor(name)})")
        for title, key in (("IS", "is_mean"), ("KID", "kid_mean"), ("precision", "precision"), ("recall", "recall")):
            if scores.get(key) is not None:
                texts[-1] += f", {title} {number(scores[key])}"
        if modes := scores.get("modes"):
            texts[-1] += f", {counted(modes, 'mode')}, KL {number(scores['mode_kl'])}"
    if learned := evaluation.about("gan_train"):
        texts.append(f"GAN-train {percent(learned['accuracy'])}")
    return "; ".join(texts)
