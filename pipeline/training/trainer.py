"""The training loop: what happens beside the steps, when, and in which order; and which failures of a checkpoint end
the run."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.checks.settings import Plan, refuse
from pipeline.config import Config, to_yaml
from pipeline.data import open_dataset, open_source
from pipeline.distributed.process import Runtime
from pipeline.distributed.progress import TrainingBar, messages_above_bars
from pipeline.distributed.slurm import job_id
from pipeline.errors import Preempted, TrainingFailed, UserError
from pipeline.models.networks import AnyGenerator
from pipeline.models.objectives import choose
from pipeline.storage.checkpoint import Checkpoint, CheckpointWriter, IntegrityError, newest_intact, sweep
from pipeline.storage.files import write_text
from pipeline.storage.lock import Lock, lock_run
from pipeline.storage.run_folder import RunFolder, environment_of
from pipeline.training.inputs import InputStream
from pipeline.training.log import Forecast, MetricsLog, profiled
from pipeline.training.state import TrainingState, build_state
from pipeline.training.step import build_step

# Evaluation, trackers, exports and reports are imported where they are used: a run may have none of them.
if TYPE_CHECKING:
    from pipeline.evaluation.scorer import Scorer
    from pipeline.evaluation.selection import Selection
    from pipeline.training.trackers import Trackers


class Trainer:
    """Trains one run. Its construction checks everything that can be checked before anything is written.

    Args:
        ends_at: returns, on the main rank and after the evaluation of a step, whether the run ends there. By default
            run.patience decides.

    Raises:
        UserError: the configuration contradicts itself, the world size, the dataset or the run's folder.
    """

    def __init__(self, config: Config, runtime: Runtime, ends_at: Callable[[int], bool] | None = None) -> None:
        self.config, self.runtime, self.folder = config, runtime, RunFolder(config.folder)
        ranks, training = runtime.ranks, config.training
        ranks.on_main(lambda: refuse(Plan(config, ranks.world_size)))
        self.dataset = ranks.on_main(lambda: open_dataset(config.data))
        plan = Plan(config, ranks.world_size, self.dataset)
        ranks.on_main(lambda: refuse(plan))
        self.objective, num_classes = choose(training), plan.num_classes(self.dataset)
        self.state = build_state(
            config, self.dataset.image_shape, num_classes, runtime.device, runtime.scaler, runtime.captures
        )
        if (start := config.run.start_from) and ranks.on_main(lambda: newest_intact(self.folder)[0]) is None:
            from pipeline.export.generator_file import warm_start

            runtime.print(warm_start(start, self.state.generator, self.state.ema, self.state.critic))
        if num_classes:
            self.state.generator.class_names = self.state.ema.class_names = self.dataset.class_names
        self._source = open_source(config, self.dataset, ranks, runtime.device)
        self.inputs = InputStream(config, self.state, self._source, ranks, runtime.captures)
        self.step = build_step(config, self.objective, self.state, runtime)
        self.log = MetricsLog(training, self.state, runtime, self.folder)
        self._trackers: Trackers | None = None
        self.scorer: Scorer | None = None
        if config.evaluation.every:
            from pipeline.evaluation.scorer import Scorer

            self.scorer = Scorer(config.evaluation, self.dataset, runtime, training.seed)
        self.selection: Selection | None = None
        if config.run.keep_best:
            from pipeline.evaluation.selection import Selection

            self.selection = Selection(config)
        best_of = self.selection.best_of if self.selection else lambda steps: None
        self.saver = Saver(config, self.state, runtime, self._progress, self._damage, best_of)
        self._last_step = training.steps
        self._ends_at = ends_at or (self.selection.is_over if self.selection else None)
        self._lock: Lock | None = None

    def run(self) -> None:
        """Trains to the last step, or to the end of run.patience, from the newest intact checkpoint if there is one.

        Raises:
            Preempted: a signal stopped it, after saving.
            TrainingFailed: a loss, gradient or weight is not finite, replicas differ, or saving failed too often.
        """
        run, every, ranks = self.config.run, self.config.evaluation.every, self.runtime.ranks
        try:
            checkpoint, remarks = ranks.on_main(self._open_folder)
            self._introduce(remarks)
            self._resume(checkpoint)
            take_step = profiled(self.take_step, self.config, self.state, self.runtime)
            bar = TrainingBar(self._last_step, self.state.step, run.name, every, disable=not ranks.is_main)
            with messages_above_bars(), bar as self._bar:
                self._sample_and_evaluate()  # what a stop right after the checkpoint left undone
                self.log.begin()
                forecast = Forecast(self.config, self.runtime, self.state.step)
                while self.state.step < self._last_step:
                    take_step()
                    self._bar.update()
                    forecast.add_step(self.state.step)
                    self.saver.report()
                    if self._due(run.log_every):
                        self._write_log()  # before the checkpoint: a resumed run writes the lines after it
                    if self._due(run.checkpoint_every) or (run.keep_best and self._due(every)):
                        self.saver.save()
                        self._comment()
                    self._sample_and_evaluate()
                    if self.runtime.stop.agreed():
                        self._stop()
                if self.log.has_steps:  # an evaluation has made this step the last one
                    self._write_log()
            self.saver.save_now()
            if self.selection is not None and self.scorer is not None:
                self.selection.export(self.scorer, self.state.step)
            ranks.on_main(self._finish)
        finally:
            self.inputs.close()
            if self._lock is not None:
                self._lock.release()

    def take_step(self) -> None:
        """Takes one training step from the state's, and nothing that happens beside the steps."""
        self.log.add(self.step(self.inputs.take()))
        self.state.step += 1

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def _introduce(self, remarks: list[str]) -> None:
        """Prints what trains and where: objective, steps, folder; ranks, device, images, networks."""
        training, runtime = self.config.training, self.runtime
        runtime.print(f"{training.objective} on {self.dataset.name}, {training.steps:,} steps, in {self.folder.path}")
        shape, count = "x".join(map(str, self.dataset.image_shape)), self.dataset.num_images("train")
        sizes = (f"{name} {number:,}" for name, number in self.state.num_weights.items())
        runtime.print(f"{runtime}; {count:,} images of {shape}; parameters: {', '.join(sizes)}")
        for line in remarks:
            runtime.print(line)

    def _open_folder(self) -> tuple[Checkpoint | None, list[str]]:
        """Makes the folder this run's, on the main rank. Returns the checkpoint to go on from, and lines about it."""
        self._lock, folder = lock_run(self.folder), self.folder
        checkpoint, damaged = newest_intact(folder)
        remarks = [f"skipped a damaged checkpoint: {line}" for line in damaged]
        if checkpoint is not None and checkpoint.progress["generator"] != self.state.generator.spec():
            raise UserError(
                f"{checkpoint.folder}: its networks double less often than images of this size now have them "
                "doubled; score and export them as they are, and train others under another run.name"
            )
        if checkpoint is not None and checkpoint.step >= self._last_step and folder.export.exists():
            remarks.append(f"{folder.path} has its {checkpoint.step:,} steps already: for more, raise --training.steps")
        else:
            if checkpoint is not None:
                remarks.append(f"going on from {checkpoint.folder}, saved at world size {checkpoint.world_size}")
            self._describe_run()
        sweep(folder)
        folder.trim_metrics(checkpoint.step if checkpoint else 0)
        return checkpoint, remarks

    def _describe_run(self) -> None:
        from pipeline.export.images import row_names

        environment = environment_of(self.runtime.hardware, job_id()) | {"weights": self.state.num_weights}
        environment |= {"dataset": self.dataset.name, "dataset_fingerprint": self.dataset.fingerprint}
        if names := row_names(self.state.generator):
            environment["sample_rows"] = list(names)
        # In this order: a folder with a config.yaml is a run, which has an environment.
        write_text(self.folder.environment, json.dumps(environment, indent=1))
        write_text(self.folder.config, to_yaml(self.config))

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self.state.load(checkpoint.tensors(), checkpoint.step)
            self.log.elapsed_seconds = checkpoint.progress["elapsed_seconds"]
            self.log.evaluation_seconds = checkpoint.progress["evaluation_seconds"]
            self.saver.begin(checkpoint.step)
        if self.config.run.trackers:
            from pipeline.training.trackers import Trackers

            self._trackers = Trackers(self.config, self.runtime, self.state.step)

    def _stop(self) -> NoReturn:
        self.saver.save_now()
        raise Preempted(f"stopped after step {self.state.step}, which is saved: the same command goes on from there")

    def _finish(self) -> None:
        from pipeline.export.generator_file import save_export
        from pipeline.export.images import interpolate, save_grid
        from pipeline.reporting.page import write_report

        self._comment(last=True)
        generator, step, seed = self._copied_generator(), self.state.step, self.config.training.seed
        source = {"run": self.config.run.name, "step": step, "dataset": self.dataset.fingerprint}
        save_export(generator, self.folder.export, source)
        save_grid(interpolate(generator, seed, 4, 10), self.folder.interpolation(step), columns=10)
        self.runtime.print(f"report: {write_report(self.folder.path)}")

    # -- cadence -------------------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.state.step % every == 0 or self.state.step == self._last_step)

    def _write_log(self) -> None:
        wait_seconds, self.inputs.wait_seconds = self.inputs.wait_seconds, 0.0
        line = self.log.write(wait_seconds, self.objective.estimates_wasserstein, self.saver.fail)
        self._bar.facts |= {name: f"{line[f'{name}_loss']:.4f}" for name in ("critic", "generator")}
        if self._trackers is not None:
            self._trackers.log_line(line)
        self.log.begin()

    def _progress(self) -> dict[str, Any]:
        from pipeline.export.generator_file import CLASS_NAMES, PROJECTS

        seconds = {"elapsed_seconds": self.log.elapsed_seconds, "evaluation_seconds": self.log.evaluation_seconds}
        names, projects = list(self.state.generator.class_names), self.objective.projects
        return {**seconds, "generator": self.state.generator.spec(), CLASS_NAMES: names, PROJECTS: projects}

    def _damage(self) -> str | None:
        return self._source.damage() or (self._lock.lost() if self._lock else None)

    def _comment(self, *, last: bool = False) -> None:
        """Makes the run's progress and scores the comment of its Slurm job."""
        if self.runtime.ranks.is_main and job_id() is not None:
            from pipeline.reporting.read import read_run

            progress = f"step {self.state.step} of {self.config.training.steps}"
            self.runtime.comment(", ".join([progress, *read_run(self.folder.path).in_brief]), last=last)

    def _sample_and_evaluate(self) -> None:
        """Draws and scores what is due at this step, except what exists already."""
        step, runtime = self.state.step, self.runtime
        if self.scorer is not None and step and self._due(self.config.evaluation.every):
            self._evaluate(self.scorer)  # first: it may make this step the last one
        grid = self.folder.grid(step)
        if step and self._due(self.config.run.sample_every) and runtime.ranks.is_main:
            if is_new := not grid.exists():
                from pipeline.export.images import sample_grid, save_grid

                with runtime.tolerating(f"step {step}: samples"):
                    images, columns = sample_grid(self._copied_generator(), self.config.training.seed)
                    save_grid(images, grid, columns)
            if self._trackers is not None:
                self._trackers.log_grid(step, is_new=is_new)

    def _evaluate(self, scorer: Scorer) -> None:
        step, runtime, ends_at, started = self.state.step, self.runtime, self._ends_at, time.monotonic()
        path = self.folder.scores(step)
        if is_new := not runtime.ranks.on_main(path.exists):
            try:
                with runtime.tolerating(f"step {step}: evaluation"):
                    facts = {"step": step, "weights": self.config.evaluation.weights}
                    critic = None if self.objective.projects else self.state.copied_critic()
                    scores = scorer.score_generator(self._copied_generator(), path, facts, critic)
                    fids = ", ".join(f"{space} FID {each['fid']:.2f}" for space, each in scores["features"].items())
                    self._bar.add_evaluation(seconds := time.monotonic() - started)
                    if runtime.ranks.is_main:
                        write_text(path, json.dumps(scores | {"timing": {"seconds": seconds}}, indent=1))
                    runtime.print(f"step {step}: {fids}, scored in {seconds:.0f} s")
                    self._comment()
            except Preempted:
                self._stop()
        self.log.add_evaluation(time.monotonic() - started)
        if self._trackers is not None:
            self._trackers.log_scores(step, is_new=is_new)
        if step < self._last_step and ends_at and runtime.ranks.on_main(lambda: ends_at(step)):
            runtime.print(f"step {step}: the run ends here, its scores do not get better")
            self._last_step = step

    def _copied_generator(self) -> AnyGenerator:
        return self.state.copied_generator(self.config.evaluation.weights)


@dataclass
class Saver:
    """Saves a run's state beside the training.

    A save that fails is reported and tried again at the next cadence, up to run.max_save_failures in a row. Every rank
    sees the same outcome at the same step, so the ranks stay in step. Its methods raise TrainingFailed on all ranks
    when the state must not be saved or saving has failed too often.
    """

    config: Config
    state: TrainingState
    runtime: Runtime
    progress: Callable[[], dict[str, Any]]
    """Returns what a resumed run needs beside the state, as JSON-serialisable values."""
    damage: Callable[[], str | None]
    """Returns why this rank must not save, whatever its state is, as a message; None: it may."""
    best_of: Callable[[list[int]], int | None]
    """Returns which of some steps has the best checkpoint, to keep it; None: none of them."""

    def __post_init__(self) -> None:
        run, bound = self.config.run, self.config.training.clip_value
        names = [f"critic.{name}" for name, _ in self.state.critic.named_parameters()]
        self.writer = CheckpointWriter(
            RunFolder(self.config.folder),
            self.runtime.ranks,
            keep_last=run.keep_last,
            keep_every=run.keep_every,
            bounds={} if bound is None else dict.fromkeys(names, bound),
            best_of=self.best_of,
        )
        self._reported_step: int | None = None
        self._begun_step = 0

    def begin(self, step: int) -> None:
        """Goes on from the checkpoint of this step."""
        self.writer.committed_step = self._reported_step = step

    def report(self) -> None:
        """Prints a line about a checkpoint that was completed since the last call."""
        if (step := self.writer.committed_step) != self._reported_step:
            self._reported_step = step
            self.runtime.print(f"step {step}: saved")

    def save(self) -> None:
        """Starts a checkpoint, after noting how the one before it ended."""
        state = self.state
        self._note_outcome(self.writer.finish)
        self._begun_step = state.step
        self._note_outcome(lambda: self.writer.save(state.tensors(), state.step, self.progress(), self.damage()))

    def save_now(self) -> None:
        """Returns when the present step is on the disk."""
        self._note_outcome(self.writer.finish)
        if self.writer.committed_step != self.state.step:
            self.save()
            self._note_outcome(self.writer.finish)
        if self.writer.committed_step != self.state.step:
            self.fail(f"step {self.state.step} could not be saved")
        self.report()

    def fail(self, reason: str) -> NoReturn:
        """Ends the run with a message that names the checkpoint that is left."""
        with contextlib.suppress(OSError, IntegrityError):
            self.writer.finish()
        committed = self.writer.committed_step
        remains = f"the last good checkpoint is step {committed}" if committed else "there is no checkpoint yet"
        raise TrainingFailed(f"{reason}; {remains}")

    def _note_outcome(self, save: Callable[[], None]) -> None:
        try:
            save()
        except IntegrityError as error:
            self.fail(f"step {self._begun_step}: must not be saved, {error}")
        except OSError as error:
            failures, allowed = self.writer.failures_in_a_row, self.config.run.max_save_failures
            self.runtime.print(f"checkpoint failed ({failures} in a row, {allowed} tolerated): {error}")
            if failures > allowed:
                self.fail(f"checkpoints can't be written: {error}")
