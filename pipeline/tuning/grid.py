"""Grids of settings: `python -m pipeline.tuning.grid [--task I | --unfinished] KEY=VALUE,VALUE ... -- [--KEY ...]`.

launch/slurm/sweep.sh calls it. It prints the folder of each run of the grid; with --task the command line of run I, one
argument a line; with --unfinished the numbers of the runs that have steps left, as `sbatch --array` takes them.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.config import Config, make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.reporting.read import read_run
from pipeline.storage.run_folder import RunFolder

COMMA = re.compile(r",(?![^\[{(]*[\]})])")
"""A comma between values, not within the brackets of one."""


def runs_of(grid: Sequence[str], shared: Sequence[str]) -> list[list[str]]:
    """Returns the command line of each run: every combination of the grid's values, the last key changing first.

    `grid` holds `KEY=VALUE,VALUE` for each key (the values of `config` are files), `shared` what all runs are given.
    Raises UserError if a key has no values or comes twice, or if two runs would have the same name.
    """
    pairs = [part.partition("=") for part in grid]
    values = {key: COMMA.split(text) for key, _, text in pairs}
    for key, count in Counter(key for key, _, _ in pairs).items():
        if count > 1 or not all(values[key]) or key.startswith("run."):
            raise UserError(f"{key} in the grid: give a key once, as KEY=VALUE,VALUE; runs get their names from it")
    labels = {key: _label(key, list(values)) for key in values}
    runs, names = [], []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        files = [f"--config={path}" for key, path in chosen.items() if key == "config"]
        settings = [f"--{key}={value}" for key, value in chosen.items() if key != "config"]
        first = Path(chosen["config"]).stem if files else parse(make_parser("grid"), shared)[0].run.name
        words = [first, *(f"{labels[key]}-{value}" for key, value in chosen.items() if key != "config")]
        names.append(re.sub(r"[^\w.-]+", "_", "-".join(words)))
        runs.append([*files, *shared, *settings, f"--run.name={names[-1]}"])
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{twice[0]} would be the name of two runs of the grid: give each value and file name once")
    return runs


def _label(key: str, keys: list[str]) -> str:
    """Returns the last parts of a dotted key, as many as tell it from the other keys."""
    parts = key.split(".")
    shorter = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in shorter if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def is_finished(config: Config) -> bool:
    """Returns whether the generator of the last step is exported, with which a run ends: that of training.steps, or of
    the step at which run.patience ended it."""
    folder = RunFolder(config.folder)
    try:
        with safe_open(folder.export, "np") as file:
            step = json.loads(file.metadata()["provenance"])["step"]
        return bool(step >= config.training.steps or step == read_run(folder.path).chosen.get("last_step"))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, UserError):
        return False


def main() -> None:
    grid, shared = sys.argv[1:], list[str]()
    if "--" in grid:
        grid, shared = grid[: grid.index("--")], grid[grid.index("--") + 1 :]
    if grid[:1] == ["--task"]:
        print("\n".join(runs_of(grid[2:], shared)[int(grid[1])]))
        return
    only_unfinished, parser = grid[:1] == ["--unfinished"], make_parser("grid")
    configs = [parse(parser, run)[0] for run in runs_of(grid[1:] if only_unfinished else grid, shared)]
    if only_unfinished:
        print(",".join(str(task) for task, config in enumerate(configs) if not is_finished(config)))
    else:
        print("\n".join(str(config.folder) for config in configs))


if __name__ == "__main__":
    run_program(main)
