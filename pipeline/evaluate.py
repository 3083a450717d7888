"""Scores images: `accelerate launch pipeline/evaluate.py TARGET [--step N | --all]`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from pipeline.checkpoint import CheckpointError, committed, find
from pipeline.config import Config, make_parser, parse
from pipeline.data import Dataset, open_dataset
from pipeline.data.images import Split, open_images
from pipeline.data.resident import load_split
from pipeline.errors import EXIT_PREEMPTED, Preempted, UserError
from pipeline.export import EXPORT_SUFFIXES, generator_of, load_generator
from pipeline.report import write_report
from pipeline.distributed.process import Runtime, run_entry
from pipeline.scoring import Scorer

TARGET = (
    "a run's folder, an exported generator (.safetensors, .h5), a folder of images, an .npz file, "
    "or the word train or test: that split of the real images"
)


def main() -> int:
    parser = make_parser("Score images. A run is evaluated with its own configuration, overrides apply.")
    parser.add_argument("target", type=Path, help=TARGET)
    parser.add_argument("--step", type=int | None, help="the checkpoint to score; the newest intact one by default")
    parser.add_argument("--all", action="store_true", help="score every checkpoint of the run")
    parser.add_argument("--out", type=Path | None, help="where the scores go, if not into the run or beside the target")
    config, arguments = parse(parser)
    target: Path = arguments.target
    if (target / "config.yaml").is_file():
        config, arguments = parse(parser, ["--config", str(target / "config.yaml"), *sys.argv[1:]])
    if arguments.all and (arguments.out or arguments.step is not None):
        raise UserError("--all scores every checkpoint into the run: leave out --step and --out")
    runtime = Runtime(config.runtime)
    try:
        _score(config, runtime, target, arguments)
    except Preempted as stop:
        runtime.say(str(stop))
        return EXIT_PREEMPTED
    finally:
        runtime.close()
    return 0


def _score(config: Config, runtime: Runtime, target: Path, arguments: Namespace) -> None:
    dataset = runtime.on_main(lambda: open_dataset(config.data))
    scorer = Scorer(config.evaluation, dataset, runtime, config.training.seed)
    out: Path | None = arguments.out
    if (target / "checkpoints").is_dir():
        _score_run(config, runtime, scorer, target, arguments)
    elif target.suffix in EXPORT_SUFFIXES:
        generator = load_generator(target, config.evaluation.weights).to(runtime.device)
        path = out or target.with_suffix(".evaluation.json")
        runtime.say(f"{path}: {_summary(scorer.score_generator(generator, path, {'images': str(target)}))}")
    else:
        images = _open_images(target, dataset)
        labels = None if images.labels is None else torch.from_numpy(images.labels)

        def render(start: int, stop: int) -> Tensor:
            return torch.from_numpy(images.read(np.arange(start, stop)))

        path = out or target.with_name(f"{target.name}.evaluation.json")
        result = scorer.score(render, images.num_images, labels, path, {"images": str(target)})
        runtime.say(f"{path}: {_summary(result)}")


def _score_run(config: Config, runtime: Runtime, scorer: Scorer, run: Path, arguments: Namespace) -> None:
    folders = runtime.on_main(lambda: committed(run / "checkpoints"))
    steps = [int(folder.name.removeprefix("step-")) for folder in folders] if arguments.all else [arguments.step]
    for wanted in steps:
        try:
            checkpoint = runtime.on_main(partial(find, run, wanted))
        except CheckpointError as error:
            if not arguments.all:
                raise
            runtime.say(f"skipped: {error}")
            continue
        generator = generator_of(checkpoint, config.evaluation.weights).to(runtime.device)
        path = arguments.out or run / "evaluation" / f"step-{checkpoint.step:08d}.json"
        result = scorer.score_generator(
            generator, path, {"step": checkpoint.step, "weights": config.evaluation.weights}
        )
        runtime.say(f"step {checkpoint.step}: {_summary(result)}")
    if arguments.out is None:
        runtime.say(f"report: {runtime.on_main(lambda: write_report(run))}")


def _open_images(target: Path, dataset: Dataset) -> Split:
    if target.exists():
        return open_images(target, dataset)
    if str(target) in dataset.splits:
        images, labels = load_split(dataset, str(target))
        return Split(len(images), labels.numpy() if dataset.num_classes else None, images.numpy().__getitem__)
    raise UserError(f"{target}: there is nothing of that name; give {TARGET}")


def _summary(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} FID {scores['fid']:.2f} (floor {scores['fid_floor'] or float('nan'):.2f}), IS {scores['is_mean']:.2f}"
        for name, scores in result["features"].items()
    )


if __name__ == "__main__":
    run_entry(main)
