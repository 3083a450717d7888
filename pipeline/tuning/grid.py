"""Grids of settings: `python -m pipeline.tuning.grid [--task I | --unfinished] KEY=VALUE,VALUE ... -- [--KEY ...]`.

For launch/slurm/sweep.sh. Prints the folder of each run; or the command line of run I, an argument a line; or the
numbers of the runs that have steps left, as `sbatch --array` takes them.
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
"""Between values, but not within the brackets of one."""


def runs_of(grid: Sequence[str], given: Sequence[str]) -> list[list[str]]:
    """The command line of each run: every combination of the grid's values, the last key's changing first.

    Args:
        grid: `KEY=VALUE,VALUE` each; the key `config` names files.
        given: what all runs have.

    Raises:
        UserError: a key without values or given twice, or two runs of the same name.
    """
    parts = [part.partition("=") for part in grid]
    values = {key: COMMA.split(text) for key, _, text in parts}
    for key, count in Counter(key for key, _, _ in parts).items():
        if count > 1 or not all(values[key]) or key.startswith("run."):
            raise UserError(f"{key} in the grid: give a key once, as KEY=VALUE,VALUE; runs get their names from it")
    labels = {key: _label(key, list(values)) for key in values}
    runs, names = [], []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        files = [f"--config={path}" for key, path in chosen.items() if key == "config"]
        settings = [f"--{key}={value}" for key, value in chosen.items() if key != "config"]
        first = Path(chosen["config"]).stem if files else parse(make_parser("grid"), given)[0].run.name
        words = [first, *(f"{labels[key]}-{value}" for key, value in chosen.items() if key != "config")]
        names.append(re.sub(r"[^\w.-]+", "_", "-".join(words)))
        runs.append([*files, *given, *settings, f"--run.name={names[-1]}"])
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{twice[0]} would be the name of two runs of the grid: give each value and file name once")
    return runs


def _label(key: str, keys: list[str]) -> str:
    """The last parts of a key, as many as no other key has."""
    parts = key.split(".")
    shorter = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in shorter if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def is_finished(config: Config) -> bool:
    """Whether the last step's generator is exported, which is what a run does at its end."""
    folder = RunFolder(config.folder)
    try:
        with safe_open(folder.export, "np") as file:
            step = json.loads(file.metadata()["provenance"])["step"]
        return bool(step >= config.training.steps or step == read_run(folder.path).chosen.get("last_step"))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, UserError):
        return False


def main() -> None:
    arguments = sys.argv[1:]
    given = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    grid = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if grid[:1] == ["--task"]:
        print("\n".join(runs_of(grid[2:], given)[int(grid[1])]))
        return
    only_unfinished, parser = grid[:1] == ["--unfinished"], make_parser("grid")
    configs = [parse(parser, run)[0] for run in runs_of(grid[1:] if only_unfinished else grid, given)]
    if only_unfinished:
        print(",".join(str(task) for task, config in enumerate(configs) if not is_finished(config)))
    else:
        print("\n".join(str(config.folder) for config in configs))


if __name__ == "__main__":
    run_program(main)
