"""Searches settings: one worker of a study that any number of them share through a journal on a common file system.

A trial trains the same settings with every seed of the study, in this process, and its value is the median of the last
scores; it is pruned where the median of its seeds so far is worse than other trials' at the same step. Optuna keeps the
journal and proposes settings. A worker that is asked to stop puts its trial back into the queue, and the next one goes
on from the trial's last checkpoint; the trial of a worker that was killed is left out, and another takes its place.
"""

from __future__ import annotations

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
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer
from pipeline.tuning.study_file import Configure, StudyFile

if TYPE_CHECKING:
    import optuna

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
        self._trial: optuna.Trial | None = None
        runtime.ranks.on_main(self._open)

    def run(self) -> None:
        """Works on trials until as many are done as the study's file says.

        Raises:
            Preempted: a signal came; the trial's step is saved, and the next worker goes on with it.
        """
        ranks = self._runtime.ranks
        while (taken := ranks.on_main(self.take)) is not None:
            folder, settings = taken
            try:
                outcome = self._train(folder, settings)
                ranks.on_main(partial(self.tell, outcome))
            except LocalError:  # perhaps of this rank alone: the job ends
                raise
            except (TrainingFailed, UserError) as error:
                ranks.on_main(partial(self.tell, str(error)))
            except Preempted:
                ranks.on_main(partial(self.put_back, folder))
                raise
            finally:
                self._runtime.before_close.close()  # a captured graph goes with its trial
        ranks.on_main(self._write_results)

    # -- the study, on the main rank -----------------------------------------------------------------------------------

    @property
    def study(self) -> optuna.Study:
        assert self._study is not None, "it is the main rank's"
        return self._study

    @property
    def trial(self) -> optuna.Trial:
        """The trial that this worker has taken."""
        assert self._trial is not None, "it is the main rank's"
        return self._trial

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

    def take(self) -> tuple[Path, dict[str, str]] | None:
        """Returns the folder and the settings of a trial that was put back, or else of a new one; None when as many are
        done as the study wants. Workers that begin one at the same time may finish a few more."""
        import optuna

        if len(self._done()) >= self._file.trials:
            return None
        self._trial = trial = self.study.ask()
        # A function of the seed, the trial and those before it: a worker alone repeats its study.
        seed = seeded(self._config.training.seed, "trial", trial.number).initial_seed() % 2**32
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
        settings = dict[str, str]()
        for key, values in self._file.space.items():
            value: Any
            match values.kind:
                case "choice":
                    value = trial.suggest_categorical(key, values.values)
                case "int":
                    value = trial.suggest_int(key, *values.values)
                case kind:
                    value = trial.suggest_float(key, *values.values, log=kind == "log")
            settings[key] = str(value)
        return self.folder / trial.user_attrs.get("folder", f"trial-{trial.number:04d}"), settings

    def tell(self, outcome: float | str) -> None:
        """Ends the trial with its value, or with the reason why it has none: it then counts among the worse ones."""
        import optuna

        if isinstance(outcome, str):
            self.trial.set_user_attr("reason", outcome)
            self.study.tell(self.trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(self.trial, outcome)
        message = outcome if isinstance(outcome, str) else f"{outcome:.4g}"
        self._runtime.say(f"trial {self.trial.number}: {message}")
        self._write_results()

    def put_back(self, folder: Path) -> None:
        """Queues the trial again under another number, with its settings and the folder of its runs."""
        import optuna

        self.study.enqueue_trial(self.trial.params, user_attrs={"folder": folder.name})
        self.study.tell(self.trial, state=optuna.trial.TrialState.FAIL)

    def _done(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that have a value or were pruned."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]

    # -- a trial -------------------------------------------------------------------------------------------------------

    def _train(self, folder: Path, settings: dict[str, str]) -> float | str:
        """Returns the trial's value, or why it was pruned."""
        ranks, seeds = self._runtime.ranks, self._file.seeds
        last_step = self._config.training.steps
        for index, seed in enumerate(seeds):
            own = {"training.seed": str(seed), "run.root": str(folder), "run.name": f"seed-{seed}"}
            config = self._configure(settings | own | {"run.trackers": "[]", "run.patience": "null"})
            trainer = Trainer(config, self._runtime, partial(self._is_worse, folder, index))
            trainer.run()
            step, more = trainer.state.step, index + 1 < len(seeds)
            if step < last_step or (more and ranks.on_main(partial(self._is_worse, folder, index, step))):
                return f"pruned at step {step} of seed {seed}"
        value = ranks.on_main(partial(self._median, folder, len(seeds), last_step))
        return "its last evaluations gave no score" if value is None else value

    def _median(self, folder: Path, count: int, step: int) -> float | None:
        """Returns the median of the scores of the first `count` seeds at a step; None if one has none."""
        values = []
        for seed in self._file.seeds[:count]:
            evaluations = read_evaluations(RunFolder(folder / f"seed-{seed}"), [])
            values += [item.score(self._space, self._key) for item in evaluations if item.step == step]
        known = [value for value in values if value is not None]
        return statistics.median(known) if len(known) == count else None

    def _is_worse(self, folder: Path, index: int, step: int) -> bool:
        """Reports the median of seeds 0, ..., index at a step; returns whether other trials had a better one there."""
        reported = index * self._config.training.steps + step
        if (value := self._median(folder, index + 1, step)) is None:
            return False
        self.trial.report(value, reported)
        return self.trial.should_prune()

    # -- results -------------------------------------------------------------------------------------------------------

    def _write_results(self) -> None:
        """The best settings as a configuration, and a table of all trials."""
        trials = self._done()
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
