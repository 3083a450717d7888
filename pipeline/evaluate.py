"""Scores a run's checkpoints or an export: `accelerate launch pipeline/evaluate.py RUN [--step N | --all]`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint import CheckpointError, committed, find
from pipeline.config import Config, UserError, make_parser, parse
from pipeline.data import open_dataset
from pipeline.export import generator_of, load_export
from pipeline.networks import Generator
from pipeline.report import write_report
from pipeline.runtime import EXIT_PREEMPTED, Preempted, Runtime, run_entry
from pipeline.scoring import Scorer


def main() -> int:
    parser = make_parser("Score generated images. A run is evaluated with its own configuration, overrides apply.")
    parser.add_argument("target", type=Path, help="a run's folder, or an export (.safetensors)")
    parser.add_argument("--step", type=int | None, help="the checkpoint to score; the newest intact one by default")
    parser.add_argument("--all", action="store_true", help="score every checkpoint of the run")
    config, arguments = parse(parser)
    target: Path = arguments.target
    if (target / "config.yaml").is_file():
        config, arguments = parse(parser, ["--config", str(target / "config.yaml"), *sys.argv[1:]])
    runtime = Runtime(config.runtime)
    try:
        _score(config, runtime, target, arguments.step, arguments.all)
    except Preempted as stop:
        runtime.say(str(stop))
        return EXIT_PREEMPTED
    finally:
        runtime.close()
    return 0


def _score(config: Config, runtime: Runtime, target: Path, step: int | None, everything: bool) -> None:
    runtime.on_main(lambda: open_dataset(config.data))
    dataset = open_dataset(config.data)
    scorer = Scorer(config.evaluation, dataset, runtime, config.training.seed)
    if target.suffix == ".safetensors":
        result = scorer.score(_placed(load_export(target), runtime), 0, target.with_suffix(".evaluation.json"))
        runtime.say(f"{target}: {_summary(result)}")
        return
    folders = runtime.on_main(lambda: committed(target / "checkpoints"))
    if not folders:
        raise UserError(f"{target}: is neither a run with checkpoints nor an export (.safetensors)")
    steps = [int(folder.name.removeprefix("step-")) for folder in folders] if everything else [step]
    for wanted in steps:
        try:
            checkpoint = runtime.on_main(partial(find, target, wanted))
        except CheckpointError as error:
            if not everything:
                raise
            runtime.say(f"skipped: {error}")
            continue
        generator = _placed(generator_of(checkpoint, config.evaluation.weights), runtime)
        path = target / "evaluation" / f"step-{checkpoint.step:08d}.json"
        runtime.say(f"step {checkpoint.step}: {_summary(scorer.score(generator, checkpoint.step, path))}")
    runtime.say(f"report: {runtime.on_main(lambda: write_report(target))}")


def _placed(generator: Generator, runtime: Runtime) -> Generator:
    return generator.to(runtime.device)


def _summary(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} FID {scores['fid']:.2f} (floor {scores['fid_floor']:.2f}), IS {scores['is_mean']:.2f}"
        for name, scores in result["features"].items()
    )


if __name__ == "__main__":
    run_entry(main)
