"""Searches settings: a worker of a study, which any number of workers share through a journal on a common file system.

A trial trains the same settings with every seed of the study, one after the other in this process. Optuna proposes the
settings, prunes trials and writes the journal. README.md beside this file says what becomes of a trial.
"""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipeline.config import Config, flatten, read_yaml
from pipeline.config.messages import unknown
from pipeline.distributed.process import Runtime
from pipeline.errors import LocalError, Preempted, TrainingFailed, UserError
from pipeline.evaluation.selection import LOWER_IS_BETTER, named_score
from pipeline.reporting.read import read_evaluations
from pipeline.rng import seeded
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer

STARTUP_TRIALS = 5
"""Number of trials that are drawn at random and never pruned, before there is something to compare with."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
RANGES = "write it as {log: [LOW, HIGH]}, {uniform: [LOW, HIGH]}, {int: [LOW, HIGH]} or {choice: [VALUE, VALUE]}"
ENTRIES = {"score": "NAME, like fid", "seeds": "[N, ...]", "trials": "N", "space": "{KEY: RANGE, ...}"}
"""The keys of a study's file, and what stands there."""
Configure = Callable[[Mapping[str, str]], Config]
"""Makes the study's configuration with some settings (dotted key -> text as on the command line) replaced."""


# -- the study's file --------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """The values that the search may try for one setting."""

    kind: str
    """log: log-uniform; uniform; int: whole numbers, both ends included; choice: any of the values."""
    values: tuple[Any, ...]
    """The lowest and the highest value as numbers, or the choices as text."""


class StudyFile(NamedTuple):
    """The content of a study's YAML file."""

    name: str
    score: str
    """The score to improve, named as by run.keep_best."""
    seeds: tuple[int, ...]
    """The seeds that each trial trains with."""
    trials: int
    """Number of trials, of all workers together."""
    space: dict[str, Range]
    """The range of each searched key."""

    def check(self, configure: Configure) -> None:
        """Raises UserError if a configuration refuses an end, or a choice, of a range, or does not give the score."""
        config = configure({})
        if config.evaluation.every is None:
            raise UserError("evaluation.every is null: a study needs evaluations, set it to a number of steps")
        named_score(self.score, config.evaluation.features, "score")
        for key, allowed in self.space.items():
            if key not in flatten(config):
                raise UserError(f"space.{unknown(key, [*flatten(config)])}")
            if key.startswith("run.") or key in ("training.seed", "training.steps"):
                raise UserError(
                    f"space.{key} cannot be searched: leave it out (all trials have the same seeds and steps)"
                )
            for value in allowed.values:
                configure({key: str(value)})

    def settings(self, config: Config) -> dict[str, Any]:
        """Returns, as JSON values, what workers must agree on to work on one study: score, seeds, space, and all other
        settings that decide about a score."""
        study: dict[str, Any] = {"score": self.score, "seeds": self.seeds}
        study |= {f"space.{key}": allowed._asdict() for key, allowed in self.space.items()}
        changing = {*self.space, "training.seed", "evaluation.batch_size", "evaluation.inception_weights"}
        fixed = flatten(config, free=False)
        for key, value in flatten(config).items():
            if (key in fixed or key.startswith(("evaluation.", "training.steps"))) and key not in changing:
                study[key] = value
        return dict(json.loads(json.dumps(study)))


def read_study(path: Path) -> StudyFile:
    """Reads a study's file, whose name without the suffix is the study's. Raises UserError if it holds no study."""
    content = read_yaml(path)
    entries: list[Any] = [content.get(key) for key in ENTRIES]
    score, seeds, trials, space = entries
    is_right = {
        "score": isinstance(score, str),
        "seeds": isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds),
        "trials": type(trials) is int and trials > 0,
        "space": isinstance(space, dict) and space,
    }
    for key in [*content, *ENTRIES]:
        if key not in ENTRIES:
            raise UserError(f"{path}: {key} is no part of a study, which has {', '.join(ENTRIES)}: give it to --config")
        if not is_right[key]:
            raise UserError(f"{path}: {key} is {content.get(key, 'missing')}: write {key}: {ENTRIES[key]}")
    ranges = {str(key): _read_range(f"{path}: space.{key}", value) for key, value in space.items()}
    return StudyFile(path.stem, score, tuple(dict.fromkeys(seeds)), trials, ranges)


def _read_range(where: str, content: Any) -> Range:
    try:
        [(kind, values)] = content.items()
        if kind == "choice" and values and isinstance(values, list):
            return Range(kind, tuple(value if isinstance(value, str) else json.dumps(value) for value in values))
        low, high = map(operator.index if kind == "int" else float, values)
        if kind in ("log", "uniform", "int") and low < high and (kind != "log" or low > 0):
            return Range(kind, (low, high))
    except (AttributeError, TypeError, ValueError):
        pass
    raise UserError(f"{where} is {content}: {RANGES}")


# -- a worker ----------------------------------------------------------------------------------------------------------


class Tuner:
    """A worker of a study. Every rank makes the same calls; only the main rank has the `study` and the `trial`.

    `folder` gets `study.journal`, the runs `trial-NUMBER-seed-SEED`, `best.yaml` (a --config file) and `study.md`.

    Raises:
        UserError: the study began with other settings, or the file is wrong (`StudyFile.check`).
    """

    study: optuna.Study
    trial: optuna.Trial

    def __init__(self, file: StudyFile, configure: Configure, runtime: Runtime) -> None:
        self._file, self._configure, self._runtime = file, configure, runtime
        self._config = configure({})
        self.folder = Path(self._config.run.root) / file.name
        runtime.ranks.on_main(lambda: file.check(configure))
        self._space, self._key = named_score(file.score, self._config.evaluation.features)
        runtime.ranks.on_main(self._open)

    def run(self) -> None:
        """Trains trials until as many are done as the study's file says. Raises Preempted if a signal came: the trial's
        step is saved, and the next worker goes on with it."""
        ranks = self._runtime.ranks
        while (taken := ranks.on_main(self.take)) is not None:
            folder, settings = taken
            try:
                outcome = self._train(folder, settings)
                ranks.on_main(partial(self.tell, outcome))
            except LocalError:  # perhaps of this rank alone, so the ranks can't go on together: the job ends
                raise
            except (TrainingFailed, UserError) as error:
                ranks.on_main(partial(self.tell, str(error)))
            except Preempted:
                ranks.on_main(partial(self.put_back, folder))
                raise
            finally:
                self._runtime.before_close.close()  # a captured CUDA graph goes with its trial
                self._runtime.accelerator.free_memory()  # or it keeps every trial's networks
        self._runtime.print(ranks.on_main(self._write_results))

    def _open(self) -> None:
        if RunFolder(self.folder).config.exists():
            raise UserError(f"{self.folder}: holds a run: give the study's file another name, or another run.root")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            study_name=self._file.name,
            storage=JournalStorage(JournalFileBackend(str(self.folder / "study.journal"))),
            direction="minimize" if LOWER_IS_BETTER[self._key] else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
            load_if_exists=True,
        )
        settings = self._file.settings(self._config)
        before = self.study.user_attrs.get("settings", settings)
        if differing := [key for key in {**settings, **before} if settings.get(key) != before.get(key)]:
            listed = "; ".join(f"{key} is {before.get(key)} there and {settings.get(key)} here" for key in differing)
            raise UserError(f"{self.folder}: holds a study with other settings ({listed}): give its file another name")
        self.study.set_user_attr("settings", settings)

    def take(self) -> tuple[Path, dict[str, str]] | None:
        """Returns the folder and the settings of a trial that was put back, or else of a new one; None if as many are
        done as the study wants. Workers that begin one at the same time may finish a few more. Main rank only."""
        if len(self.study.get_trials(deepcopy=False, states=DONE)) >= self._file.trials:
            return None
        self.trial = trial = self.study.ask()
        # A function of the seed, the trial and those before it: a study with one worker can be repeated.
        seed = seeded(self._config.training.seed, "trial", trial.number).initial_seed() % 2**32
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
        suggest: dict[str, Callable[..., object]] = {
            "choice": lambda key, *values: trial.suggest_categorical(key, values),
            "int": trial.suggest_int,
            "uniform": trial.suggest_float,
            "log": partial(trial.suggest_float, log=True),
        }
        settings = {key: str(suggest[kind](key, *values)) for key, (kind, values) in self._file.space.items()}
        return self.folder / trial.user_attrs.get("folder", f"trial-{trial.number:04d}"), settings

    def tell(self, outcome: float | str) -> None:
        """Ends the trial with its value, or with the reason why it was pruned or failed. Main rank only."""
        if isinstance(outcome, str):
            self.trial.set_user_attr("reason", outcome)
            self.study.tell(self.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(self.trial, outcome)
        message = outcome if isinstance(outcome, str) else f"{self._space} {self._key} {outcome:.4g}"
        self._runtime.print(f"trial {self.trial.number} of {self._file.trials}: {message}")
        self._write_results()

    def put_back(self, folder: Path) -> None:
        """Queues the trial again, under another number, with its settings and its folder. Main rank only."""
        self.study.enqueue_trial(self.trial.params, user_attrs={"folder": folder.name})
        self.study.tell(self.trial, state=TrialState.FAIL)

    def _train(self, folder: Path, settings: dict[str, str]) -> float | str:
        """Trains with every seed; returns the trial's value, or why it was pruned."""
        ranks, seeds = self._runtime.ranks, self._file.seeds
        last_step = self._config.training.steps
        for index, seed in enumerate(seeds):
            path = _of_seed(folder, seed)
            run = {"run.root": str(path.parent), "run.name": path.name, "training.seed": str(seed)}
            config = self._configure({**settings, **run, "run.trackers": "[]", "run.patience": "null"})
            trainer = Trainer(config, self._runtime, partial(self._is_worse, folder, index))
            trainer.run()
            step, is_last = trainer.state.step, index + 1 == len(seeds)
            if step < last_step or (not is_last and ranks.on_main(partial(self._is_worse, folder, index, step))):
                return f"pruned at step {step} of seed {seed}"
        value = ranks.on_main(partial(self._median, folder, len(seeds), last_step))
        return "its last evaluations gave no score" if value is None else value

    def _is_worse(self, folder: Path, index: int, step: int) -> bool:
        """Reports the median of seeds 0, ..., index at a step; returns whether other trials had a better one there."""
        if (value := self._median(folder, index + 1, step)) is None:
            return False
        self.trial.report(value, index * self._config.training.steps + step)
        return self.trial.should_prune()

    def _median(self, folder: Path, count: int, step: int) -> float | None:
        """Returns the median of the scores of the first `count` seeds at a step; None if one has none."""
        runs = [read_evaluations(RunFolder(_of_seed(folder, seed)), []) for seed in self._file.seeds[:count]]
        scores = [item.score(self._space, self._key) for run in runs for item in run if item.step == step]
        known = [score for score in scores if score is not None]
        return statistics.median(known) if len(known) == count else None

    def _write_results(self) -> str:
        """Writes the best settings as a configuration, and a table of all trials, the best first; returns a line about
        them."""
        trials, keys = self.study.get_trials(deepcopy=False, states=DONE), list(self._file.space)
        sign = 1 if LOWER_IS_BETTER[self._key] else -1
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        complete.sort(key=lambda trial: sign * (trial.value or 0.0))
        what = f"median {self._space} {self._key} over seeds {', '.join(map(str, self._file.seeds))}"
        outcome_of_best = "none is best"
        if complete:
            outcome_of_best = f"trial {complete[0].number} is best: --config {self.folder}/best.yaml"
            best = flatten(self._configure({key: str(value) for key, value in complete[0].params.items()}))
            best["run.name"], defaults = f"{self._file.name}-best", flatten(Config())
            changed: dict[str, Any] = {}
            for key in [key for key, value in best.items() if value != defaults[key]]:
                *sections, name = key.split(".")
                reduce(lambda place, section: place.setdefault(section, {}), sections, changed)[name] = best[key]
            header = f"# Trial {complete[0].number} of the study {self._file.name}: {what}: {complete[0].value:.4g}.\n"
            plain = json.loads(json.dumps(changed))  # YAML's safe subset has no tuples
            write_text(self.folder / "best.yaml", header + yaml.safe_dump(plain, sort_keys=False))
        rows = [["trial", "state", what, *keys], ["---"] * (3 + len(keys))]
        for trial in [*complete, *(trial for trial in trials if trial not in complete)]:
            outcome = f"{trial.value:.4g}" if trial in complete else trial.user_attrs.get("reason", "")
            chosen = [f"{x:.4g}" if isinstance(x := trial.params.get(key, ""), float) else str(x) for key in keys]
            rows.append([str(trial.number), trial.state.name.lower(), outcome, *chosen])
        table = "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in rows)
        title = f"# {self._file.name}: {len(complete)} of {len(trials)} complete"
        write_text(self.folder / "study.md", f"{title}\n\n{table}\n")
        return f"{title[2:]}; {outcome_of_best}; all: {self.folder}/study.md"


def _of_seed(trial: Path, seed: int) -> Path:
    """Returns the folder of a trial's run with a seed."""
    return trial.with_name(f"{trial.name}-seed-{seed}")
