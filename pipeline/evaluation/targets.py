"""What `evaluate.py` is pointed at: a run, an exported generator, images that lie in files, or a real split."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data import Dataset
from pipeline.data.images import open_images
from pipeline.data.resident import load_split
from pipeline.errors import UserError
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.scorer import Scorer
from pipeline.export.generator_file import EXPORT_SUFFIXES, generator_of, load_generator
from pipeline.reporting.page import write_report
from pipeline.storage.checkpoint import CheckpointError, committed, find
from pipeline.storage.run_folder import RunFolder, step_of

TARGET = (
    "a run's folder, an exported generator (.safetensors, .h5), a folder of images, an .npz file, "
    "or the word train or test: that split of the real images"
)


def score_target(target: Path, scorer: Scorer, steps: list[int | None] | None, out: Path | None) -> None:
    """Scores `target`, which is a TARGET, into `out` (by default into the run, or beside the target) and tells them.

    Args:
        steps: the checkpoints of a run to score; None is the newest intact one. Without a list it is all of them, and
            those that are damaged are told and left out.

    Raises:
        UserError: it is no TARGET or damaged, it does not suit the dataset, or `out` holds scores of other images.
        Preempted: a signal came.
    """
    facts, runtime = {"images": str(target)}, scorer.runtime
    if RunFolder(target).checkpoints.is_dir():
        _score_run(RunFolder(target), scorer, steps, out)
    elif target.suffix in EXPORT_SUFFIXES:
        generator = load_generator(target, scorer.config.weights).to(runtime.device)
        path = out or target.with_suffix(".evaluation.json")
        runtime.say(f"{path}: {_summary(scorer.score_generator(generator, path, facts))}")
    else:
        path = out or target.with_name(f"{target.name}.evaluation.json")
        runtime.say(f"{path}: {_summary(scorer.score(_open_images(target, scorer.dataset), path, facts))}")


def _score_run(run: RunFolder, scorer: Scorer, steps: list[int | None] | None, out: Path | None) -> None:
    weights, runtime = scorer.config.weights, scorer.runtime
    found = runtime.ranks.on_main(lambda: committed(run))
    for step in steps or map(step_of, found):
        try:
            checkpoint = runtime.ranks.on_main(partial(find, run, step))
        except CheckpointError as error:
            if steps:
                raise
            runtime.say(f"skipped: {error}")
            continue
        generator = generator_of(checkpoint, weights).to(runtime.device)
        facts = {"step": checkpoint.step, "weights": weights}
        result = scorer.score_generator(generator, out or run.scores(checkpoint.step), facts)
        runtime.say(f"step {checkpoint.step}: {_summary(result)}")
    if out is None:
        runtime.say(f"report: {runtime.ranks.on_main(lambda: write_report(run.path))}")


def _open_images(target: Path, dataset: Dataset) -> ImageSet:
    if target.exists():
        split = open_images(target, dataset)

        def render(start: int, stop: int) -> Tensor:
            return torch.from_numpy(split.read(np.arange(start, stop)))

        return ImageSet(split.num_images, render, None if split.labels is None else torch.from_numpy(split.labels))
    if str(target) in dataset.splits:
        images, labels = load_split(dataset, str(target))
        return ImageSet.of_tensor(images, labels if dataset.num_classes else None)
    raise UserError(f"{target}: there is nothing of that name; give {TARGET}")


def _summary(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} FID {scores['fid']:.2f} (floor {scores['fid_floor'] or float('nan'):.2f}), "
        f"IS {scores['is_mean'] or float('nan'):.2f}"
        for name, scores in result["features"].items()
    )
