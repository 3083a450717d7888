"""Searches settings: one worker of a study that any number of them share through a journal on a common file system.

A trial trains the same settings with every seed of the study, in this process, and its value is the median of the last
scores; it is pruned where the median of its seeds so far is worse than other trials' at the same step. Optuna keeps the
journal and proposes settings; the trial's lock tells who works on it. So what a killed worker left is taken up by the
next one that looks, which goes on from the trial's last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import Config, flatten
from pipeline.distributed.process import Runtime
from pipeline.errors import LocalError, Preempted, TrainingFailed, UserError
from pipeline.evaluation.selection import LOWER_IS_BETTER, named_score
from pipeline.reporting.read import read_evaluations
from pipeline.rng import seeded
from pipeline.storage.files import write_text
from pipeline.storage.lock import RunLock
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer
from pipeline.tuning.study_file import Configure, StudyFile

if TYPE_CHECKING:
    import optuna

MAX_ATTEMPTS = 3
"""Workers that a trial may bring down (out of memory) before it is given up."""
STARTUP_TRIALS = 5
"""Trials that are drawn at random and never pruned, before there is something to compare with."""


class Tuner:
    """A worker. Every rank makes the same calls; the main one talks to the study.

    `folder` gets `study.journal`, a folder of runs for each trial, `best.yaml` (a --config file) and `study.md`.

    Raises:
        UserError: the study began with other settings, the file is wrong (`StudyFile.check`), or Optuna is missing.
    """

    def __init__(self, study: StudyFile, configure: Configure, runtime: Runtime) -> None:
        self._file, self._configure, self._runtime = study, configure, runtime
        self._config = configure({})
        self.folder = Path(self._config.run.root) / study.name
        runtime.ranks.on_main(lambda: study.check(configure))
        self._space, self._key = named_score(study.score, self._config.evaluation.features)
        self._study: optuna.Study | None = None
        runtime.ranks.on_main(self._open)
        self._lock: RunLock | None = None

    def run(self) -> None:
        """Works on trials until there are as many as the study's file says.

        Raises:
            Preempted: a signal came; the trial's step is saved, and whoever comes next goes on with it.
        """
        ranks = self._runtime.ranks
        while (taken := ranks.on_main(self.take)) is not None:
            number, settings = taken
            try:
                outcome = self._train(number, settings)
                ranks.on_main(partial(self.tell, number, outcome))
            except LocalError:  # perhaps of this rank alone: the job ends
                raise
            except (TrainingFailed, UserError) as error:
                ranks.on_main(partial(self.tell, number, str(error)))
            except Preempted:
                ranks.on_main(partial(self._count_attempt, number, -1))
                raise
            finally:
                self._runtime.before_close.close()  # a captured graph goes with its trial
                if self._lock is not None:
                    self._lock.release()
        ranks.on_main(self._write_results)

    # -- the study, on the main rank -----------------------------------------------------------------------------------

    @property
    def study(self) -> optuna.Study:
        assert self._study is not None, "it is the main rank's"
        return self._study

    def _open(self) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError("a study needs Optuna: pip install 'gan-pipeline[tune]'") from None
        if RunFolder(self.folder).config.exists():
            raise UserError(f"{self.folder}: holds a run: give the study's file another name, or another run.root")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = JournalFileBackend(str(self.folder / "study.journal"))
        self._study = optuna.create_study(
            study_name=self._file.name,
            storage=optuna.storages.JournalStorage(journal),
            direction="minimize" if LOWER_IS_BETTER[self._key] else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
            load_if_exists=True,
        )
        settings = self._file.settings(self._config)
        before = self.study.user_attrs.get("settings", settings)
        if differing := [key for key in {**settings, **before} if settings.get(key) != before.get(key)]:
            told = "; ".join(f"{key} is {before.get(key)} there and {settings.get(key)} here" for key in differing)
            raise UserError(f"{self.folder}: holds a study with other settings ({told}): give its file another name")
        self.study.set_user_attr("settings", settings)

    def take(self) -> tuple[int, dict[str, str]] | None:
        """The number and settings of a trial that is nobody's, locked: one that was left, or else a new one."""
        import optuna

        while True:
            trials = self.study.get_trials(deepcopy=False)[: self._file.trials]
            left = [trial.number for trial in trials if trial.state == optuna.trial.TrialState.RUNNING]
            new = [] if len(trials) == self._file.trials else [self.study.ask().number]
            for number in [*left, *new]:
                if number < self._file.trials and self._is_mine(number):
                    return number, self._settings(number)
            if not new:
                return None

    def _is_mine(self, number: int) -> bool:
        """Takes the trial's lock, unless another has it, or the trial has ended meanwhile."""
        import optuna

        try:
            self._lock = RunLock(RunFolder(self._trial_folder(number)))
        except UserError:
            return False
        if self.study.get_trials(deepcopy=False)[number].state == optuna.trial.TrialState.RUNNING:
            if self._count_attempt(number, 1) <= MAX_ATTEMPTS:
                return True
            self.tell(number, f"given up, {MAX_ATTEMPTS} workers ended in it")
        self._lock.release()
        return False

    def _count_attempt(self, number: int, count: int) -> int:
        trial = self._trial(number)
        attempts = int(trial.user_attrs.get("attempts", 0)) + count
        trial.set_user_attr("attempts", attempts)
        return attempts

    def _trial(self, number: int) -> optuna.Trial:
        import optuna

        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def _settings(self, number: int) -> dict[str, str]:
        """What Optuna proposes; for a trial that has settings already, these."""
        import optuna

        # A function of the seed, the trial and those before it: a worker alone repeats its study.
        seed = seeded(self._config.training.seed, "trial", number).initial_seed() % 2**32
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
        trial, settings = self._trial(number), dict[str, str]()
        for key, found in self._file.space.items():
            value: Any
            match found.kind:
                case "choice":
                    value = trial.suggest_categorical(key, found.values)
                case "int":
                    value = trial.suggest_int(key, *found.values)
                case kind:
                    value = trial.suggest_float(key, *found.values, log=kind == "log")
            settings[key] = str(value)
        return settings

    def tell(self, number: int, outcome: float | str) -> None:
        """Ends a trial with its value, or with the reason why it has none: it then counts among the worse ones."""
        import optuna

        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # a worker lost for long was not lost
            if isinstance(outcome, str):
                self._trial(number).set_user_attr("reason", outcome)
                self.study.tell(number, state=optuna.trial.TrialState.PRUNED)
            else:
                self.study.tell(number, outcome, skip_if_finished=True)
        self._runtime.say(f"trial {number}: {outcome if isinstance(outcome, str) else f'{outcome:.4g}'}")
        self._write_results()

    # -- a trial -------------------------------------------------------------------------------------------------------

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _train(self, number: int, settings: dict[str, str]) -> float | str:
        """The trial's value, or why it was pruned."""
        ranks, folder, seeds = self._runtime.ranks, self._trial_folder(number), self._file.seeds
        last_step = self._config.training.steps
        for index, seed in enumerate(seeds):
            own = {"training.seed": str(seed), "run.root": str(folder), "run.name": f"seed-{seed}"}
            config = self._configure(settings | own | {"run.trackers": "[]", "run.patience": "null"})
            trainer = Trainer(config, self._runtime, partial(self._is_worse, number, index))
            trainer.run()
            step, more = trainer.state.step, index + 1 < len(seeds)
            if step < last_step or (more and ranks.on_main(partial(self._is_worse, number, index, step))):
                return f"pruned at step {step} of seed {seed}"
        value = ranks.on_main(partial(self._median, number, len(seeds), last_step))
        return "its last evaluations gave no score" if value is None else value

    def _median(self, number: int, count: int, step: int) -> float | None:
        """Of the scores of the first `count` seeds at a step; None if one has none."""
        values = []
        for seed in self._file.seeds[:count]:
            evaluations = read_evaluations(RunFolder(self._trial_folder(number) / f"seed-{seed}"), [])
            values += [item.score(self._space, self._key) for item in evaluations if item.step == step]
        known = [value for value in values if value is not None]
        return statistics.median(known) if len(known) == count else None

    def _is_worse(self, number: int, index: int, step: int) -> bool:
        """Reports the median of seeds 0, ..., index at a step; whether other trials had a better one there."""
        reported = index * self._config.training.steps + step
        trial, value = self._trial(number), self._median(number, index + 1, step)
        if value is None:
            return False
        if reported not in self.study.get_trials(deepcopy=False)[number].intermediate_values:
            trial.report(value, reported)
        return trial.should_prune()

    # -- results -------------------------------------------------------------------------------------------------------

    def _write_results(self) -> None:
        """The best settings as a configuration, and a table of all trials."""
        trials = self.study.get_trials(deepcopy=False)[: self._file.trials]
        done = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
        sign = 1 if LOWER_IS_BETTER[self._key] else -1
        done.sort(key=lambda trial: sign * (trial.value or 0.0))
        what = f"median {self._space} {self._key} over seeds {', '.join(map(str, self._file.seeds))}"
        if done:
            best = self._configure({key: str(value) for key, value in done[0].params.items()})
            header = f"# Trial {done[0].number} of the study {self._file.name}: {what}: {done[0].value:.4g}.\n"
            write_text(self.folder / "best.yaml", header + _differences(best, f"{self._file.name}-best"))
        keys = list(self._file.space)
        rows = [["trial", "state", what, *keys], ["---"] * (3 + len(keys))]
        for trial in [*done, *(trial for trial in trials if trial not in done)]:
            value = f"{trial.value:.4g}" if trial in done else trial.user_attrs.get("reason", "")
            chosen = [f"{x:.4g}" if isinstance(x := trial.params.get(key, ""), float) else str(x) for key in keys]
            rows.append([str(trial.number), trial.state.name.lower(), value, *chosen])
        table = "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in rows)
        write_text(self.folder / "study.md", f"# {self._file.name}: {len(done)} of {len(trials)} complete\n\n{table}\n")


def _differences(config: Config, name: str) -> str:
    """The settings that are not the defaults, as a YAML file of configs/ has them."""
    defaults, nested = flatten(Config()), dict[str, Any]()
    for key, value in (flatten(config) | {"run.name": name}).items():
        if value != defaults[key]:
            *sections, last = key.split(".")
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
    return yaml.safe_dump(json.loads(json.dumps(nested)), sort_keys=False)
