"""The training loop and its cadence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline.checks.settings import Plan, refuse
from pipeline.config import Config, to_yaml
from pipeline.data import open_dataset, open_source
from pipeline.distributed.process import Runtime
from pipeline.distributed.progress import TrainingBar, messages_above_bars
from pipeline.distributed.slurm import job_id
from pipeline.errors import Preempted, UserError
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.selection import Selection
from pipeline.export.generator_file import CLASS_NAMES, save_export
from pipeline.export.images import interpolate, row_names, sample_grid, save_grid
from pipeline.models.networks import AnyGenerator, Critic
from pipeline.models.objectives import choose
from pipeline.reporting.formatting import in_brief
from pipeline.reporting.read import read_run
from pipeline.storage.checkpoint import newest_intact, sweep
from pipeline.storage.files import write_text
from pipeline.storage.lock import Lock, lock_run
from pipeline.storage.run_folder import RunFolder, environment_of
from pipeline.training.inputs import InputStream
from pipeline.training.metrics_log import MetricsLog
from pipeline.training.profiler import profiled
from pipeline.training.saving import Saver
from pipeline.training.state import build_state
from pipeline.training.step import build_step
from pipeline.training.trackers import Trackers


class Trainer:
    """Trains one run. Building it checks everything that can be checked before anything is written.

    Args:
        ends_at: asked on the main rank after the evaluation of a step whether the run ends there; by default it does
            when run.patience says so.

    Raises:
        UserError: the configuration contradicts itself, the world size, the dataset or the run's folder.
    """

    def __init__(self, config: Config, runtime: Runtime, ends_at: Callable[[int], bool] | None = None) -> None:
        self.config, self.runtime, self.folder = config, runtime, RunFolder(config.folder)
        ranks, training = runtime.ranks, config.training
        ranks.on_main(lambda: refuse(Plan(config, ranks.world_size)))
        self.dataset = ranks.on_main(lambda: open_dataset(config.data))
        ranks.on_main(lambda: refuse(Plan(config, ranks.world_size, self.dataset)))
        self.objective = choose(training)
        num_classes = self.dataset.num_classes if self.objective.classifies else 0
        self.state = build_state(
            config, self.dataset.image_shape, num_classes, runtime.device, runtime.scaler, runtime.captures
        )
        if num_classes:
            self.state.generator.class_names = self.state.ema.class_names = self.dataset.class_names
        source = open_source(config, self.dataset, ranks, runtime.device)
        self.inputs = InputStream(config, self.state, source, ranks, runtime.captures)
        self.step = build_step(config, self.objective, self.state, runtime)
        self.log = MetricsLog(training, self.state, runtime, self.folder)
        self.trackers = Trackers(config, runtime, self.folder)
        self.scorer = (
            Scorer(config.evaluation, self.dataset, runtime, training.seed) if config.evaluation.every else None
        )
        self.selection = Selection(config) if config.run.keep_best else None
        self.saver = Saver(config, self.state, runtime, self._progress, self._damage, self.selection)
        self._last_step = training.steps
        self._ends_at = ends_at or (self.selection.is_over if self.selection else None)
        self._lock: Lock | None = None

    def run(self) -> None:
        """Trains to the last step, or until run.patience is at its end, from the newest intact checkpoint if there is
        one.

        Raises:
            Preempted: a signal stopped it, after saving.
            TrainingFailed: a loss, gradient or weight is not finite, replicas differ, or saving failed too often.
        """
        run = self.config.run
        try:
            self._open_folder()
            self._resume()
            self.trackers.begin(self.state.step)
            take_step = profiled(self.take_step, run, self.state, self.runtime, self.folder)
            with messages_above_bars(), self._progress_bar() as self._bar:
                self._sample_and_evaluate()  # what a stop right after the checkpoint left undone
                self.log.begin()
                while self.state.step < self._last_step:
                    take_step()
                    self._bar.update()
                    self.saver.tell()
                    if self._due(run.log_every):
                        self._write_log()  # first: a run goes on behind its checkpoint
                    if self._due(run.checkpoint_every) or (run.keep_best and self._due(self.config.evaluation.every)):
                        self._save()
                    self._sample_and_evaluate()
                    if self.runtime.stop.agreed():
                        self._stop()
                if self.log.has_steps:  # an evaluation has made this step the last one
                    self._write_log()
            self.saver.save_now()
            if self.selection is not None and self.scorer is not None:
                self.selection.export(self.scorer, self.state.step)
            self.runtime.ranks.on_main(self._finish)
        finally:
            self.inputs.close()
            if self._lock is not None:
                self._lock.release()

    def take_step(self) -> None:
        """One training step from the state's, without its cadence."""
        self.log.add(self.step(self.inputs.take()))
        self.state.step += 1

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def _open_folder(self) -> None:
        self.runtime.ranks.on_main(self._describe)
        self.log.introduce(self.dataset)

    def _describe(self) -> None:
        self._lock, runtime, dataset = lock_run(self.folder), self.runtime, self.dataset
        made_with = environment_of(runtime.ranks.world_size, runtime.device, len(runtime.cores), job_id())
        made_with |= {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
        if names := row_names(self.state.generator):
            made_with["sample_rows"] = list(names)
        # In this order: a folder with a config.yaml is a run.
        write_text(self.folder.environment, json.dumps(made_with, indent=1))
        write_text(self.folder.config, to_yaml(self.config))
        sweep(self.folder)

    def _resume(self) -> None:
        checkpoint, damaged = self.runtime.ranks.on_main(lambda: newest_intact(self.folder))
        for line in damaged:
            self.runtime.print(f"skipped a damaged checkpoint: {line}")
        if checkpoint is not None:
            if checkpoint.progress["generator"] != self.state.generator.spec():
                raise UserError(
                    f"{checkpoint.folder}: its networks double less often than images of this size now have them "
                    "doubled; score and export them as they are, and train others under another run.name"
                )
            self.state.load(checkpoint.tensors(), checkpoint.step)
            self.log.elapsed_seconds = checkpoint.progress["elapsed_seconds"]
            self.log.evaluation_seconds = checkpoint.progress["evaluation_seconds"]
            self.saver.begin(checkpoint.step)
            self.runtime.print(f"going on from {checkpoint.folder}, written by {checkpoint.world_size} process(es)")
        self.runtime.ranks.on_main(lambda: self.folder.trim_metrics(self.state.step))

    def _progress_bar(self) -> TrainingBar:
        name, last_step, quiet = self.config.run.name, self.config.training.steps, not self.runtime.ranks.is_main
        return TrainingBar(last_step, self.state.step, name, self.config.evaluation.every, disable=quiet)

    def _stop(self) -> NoReturn:
        self.saver.save_now()
        raise Preempted(f"stopped after step {self.state.step}, which is saved: the same command goes on from there")

    def _finish(self) -> None:
        from pipeline.reporting.page import write_report  # here: it brings matplotlib

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
        if (fault := self.log.fault()) is not None:
            self.saver.fail(fault)
        wait_seconds, self.inputs.wait_seconds = self.inputs.wait_seconds, 0.0
        self._bar.facts |= self.log.write(wait_seconds, self.objective.estimates_wasserstein)

    def _save(self) -> None:
        self.saver.save()
        self._comment()

    def _progress(self) -> dict[str, Any]:
        seconds = {"elapsed_seconds": self.log.elapsed_seconds, "evaluation_seconds": self.log.evaluation_seconds}
        names = list(self.state.generator.class_names)
        return {**seconds, "generator": self.state.generator.spec(), CLASS_NAMES: names}

    def _damage(self) -> str | None:
        return self.inputs.damage() or (self._lock.lost() if self._lock else None)

    def _comment(self, *, last: bool = False) -> None:
        if self.runtime.ranks.is_main and job_id() is not None:
            told = ", ".join(
                [f"step {self.state.step} of {self.config.training.steps}", *in_brief(read_run(self.folder.path))]
            )
            self.runtime.comment(told, last=last)

    def _sample_and_evaluate(self) -> None:
        """Idempotent: what exists already for this step is left alone."""
        step, runtime = self.state.step, self.runtime
        if self.scorer is not None and step and self._due(self.config.evaluation.every):
            self._evaluate(self.scorer)  # first: it may make this step the last one
        grid = self.folder.grid(step)
        if step and self._due(self.config.run.sample_every) and runtime.ranks.is_main:
            if is_new := not grid.exists():
                with runtime.tolerating(f"step {step}: samples"):
                    images, columns = sample_grid(self._copied_generator(), self.config.training.seed)
                    save_grid(images, grid, columns)
            self.trackers.log_grid(step, is_new=is_new)

    def _evaluate(self, scorer: Scorer) -> None:
        step, runtime, ends_at, started = self.state.step, self.runtime, self._ends_at, time.monotonic()
        scores = self.folder.scores(step)
        if is_new := not runtime.ranks.on_main(scores.exists):
            try:
                with runtime.tolerating(f"step {step}: evaluation"):
                    facts = {"step": step, "weights": self.config.evaluation.weights}
                    copied = self.state.copied_critic()
                    critic = copied if isinstance(copied, Critic) else None  # as `critic_of` a checkpoint
                    found = scorer.score_generator(self._copied_generator(), scores, facts, critic)["features"]
                    fids = ", ".join(f"{name} FID {values['fid']:.2f}" for name, values in found.items())
                    self._bar.add_evaluation(seconds := time.monotonic() - started)
                    runtime.print(f"step {step}: {fids}, scored in {seconds:.0f} s")
                    self._comment()
            except Preempted:
                self._stop()
        self.log.add_evaluation(time.monotonic() - started)
        self.trackers.log_scores(step, is_new=is_new)
        if step < self._last_step and ends_at and runtime.ranks.on_main(lambda: ends_at(step)):
            runtime.print(f"step {step}: the run ends here, its scores do not get better")
            self._last_step = step

    def _copied_generator(self) -> AnyGenerator:
        return self.state.copied_generator(self.config.evaluation.weights)
