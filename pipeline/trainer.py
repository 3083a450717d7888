"""The training loop and its cadence."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import Tensor

from pipeline import rng
from pipeline.checkpoint import CheckpointWriter, IntegrityError, newest_intact, sweep
from pipeline.config import Config, OptimizerConfig, flatten, to_yaml
from pipeline.data import Batch, open_dataset, open_source
from pipeline.errors import LocalError, Preempted, TrainingFailed, UserError
from pipeline.export import save_export
from pipeline.networks import Generator
from pipeline.objectives import choose
from pipeline.pictures import interpolate, sample_grid, save_grid
from pipeline.progress import bar
from pipeline.report import write_report
from pipeline.runtime import Runtime
from pipeline.scoring import Scorer
from pipeline.state import build_state
from pipeline.step import CapturedStep, Step, StepInputs
from pipeline.storage.files import write_text
from pipeline.storage.lock import RunLock
from pipeline.updates import Descent


class Trainer:
    """Trains one run. Building it checks everything that can be checked before anything is written.

    Raises:
        UserError: the configuration contradicts itself, the world size, the dataset or the run's folder.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime, self.folder = config, runtime, config.folder
        training = config.training
        self.objective = choose(training)
        self.rows = rng.rank_slice(training.batch_size, runtime.rank, runtime.world_size)
        share, parts = self.rows.stop - self.rows.start, config.runtime.accumulation
        if share % parts:
            raise UserError(
                f"runtime.accumulation is {parts}: it does not divide the {share} images that a rank takes of "
                f"training.batch_size {training.batch_size}"
            )
        saved_environment = runtime.on_main(lambda: check_run_folder(config))
        self.dataset = runtime.on_main(lambda: open_dataset(config.data))
        if saved_environment and saved_environment["dataset_fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"{self.folder}: was trained on another version of {self.dataset.name}: use another run.name"
            )
        if self.objective.classifies and self.dataset.num_classes < 2:
            raise UserError(f"training.objective is {training.objective}, but {self.dataset.name} has no labels")
        num_classes = self.dataset.num_classes if self.objective.classifies else 0
        self.state = build_state(config, self.dataset.image_shape, num_classes, runtime.device, runtime.scaler)
        self.source = open_source(
            config.data,
            self.dataset,
            batch_size=training.batch_size,
            seed=training.seed,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
        )
        self.scorer = (
            Scorer(config.evaluation, self.dataset, runtime, training.seed) if config.evaluation.every else None
        )

        runtime.synchronise_batch_norm(self.state.generator)
        step = Step(
            training,
            self.objective,
            self.state,
            runtime.wrap(self.state.critic, parallel=parts == 1),
            runtime.wrap(self.state.generator, parallel=parts == 1),
            Descent(runtime.scaler, parts, runtime.world_size, runtime.sum_over_ranks),
        )
        self._step = CapturedStep(step) if config.runtime.cuda_graph else step
        self.writer = CheckpointWriter(
            self.folder / "checkpoints",
            rank=runtime.rank,
            world_size=runtime.world_size,
            keep_last=config.run.keep_last,
            keep_every=config.run.keep_every,
            clip_value=training.clip_value,
        )
        self.elapsed_seconds = self.evaluation_seconds = 0.0
        self.scores = ""
        self.lock: RunLock | None = None
        self.interval = Interval(runtime, self.state.generator.dense.weight.dtype)

    def run(self) -> None:
        """Trains to the last step, from the newest intact checkpoint if there is one.

        Raises:
            Preempted: a signal stopped it, after saving.
            TrainingFailed: a loss or weight is not finite, replicas differ, or saving failed too often.
        """
        self._open_folder()
        try:
            self._resume()
            self._sample_and_evaluate()  # what a stop right after the checkpoint left undone
            self._train()
            self._save_now()
            self.runtime.on_main(self._finish)
        finally:
            if self.lock is not None:
                self.lock.release()

    def _train(self) -> None:
        state, last_step = self.state, self.config.training.steps
        batches = self.source.batches(state.step * self.config.training.n_critic)
        progress = bar(
            total=last_step,
            initial=state.step,
            desc=self.config.run.name,
            unit="step",
            disable=not self.runtime.is_main,
        )
        self.interval.begin()
        with progress:
            while state.step < last_step:
                self.train_step(batches)
                state.step += 1
                progress.update()
                if self._due(self.config.run.log_every):
                    self._check_losses()
                if self._due(self.config.run.checkpoint_every):
                    self.save()
                self._sample_and_evaluate()
                if self._due(self.config.run.log_every):
                    progress.set_postfix(self._log(), refresh=False)
                if self.runtime.stop_agreed():
                    self._stop()

    # -- one step ------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[Batch]) -> None:
        self.interval.add(self._step(self._inputs(batches)))

    def _inputs(self, batches: Iterator[Batch]) -> StepInputs:
        training, step, latent_dim = self.config.training, self.state.step, self.config.network.latent_dim
        iterations = range(training.n_critic)
        drawn = [self.interval.wait_for(batches) for _ in iterations]
        critic_latents, critic_labels, mixes = [], [], []
        for index in iterations:
            critic_latents.append(self.draw(rng.critic_latents, step, index, training.batch_size, latent_dim))
            critic_labels.append(self.draw_labels(rng.critic_labels, step, index))
            if training.gradient_penalty is not None:
                mixes.append(self.draw(rng.penalty_mix, step, index, training.batch_size))
        first = step * training.n_critic
        return StepInputs(
            torch.stack([batch.images for batch in drawn]),
            torch.stack([batch.labels for batch in drawn]),
            torch.stack(critic_latents),
            torch.stack(critic_labels),
            torch.stack(mixes) if mixes else None,
            self.draw(rng.generator_latents, step, training.batch_size, latent_dim),
            self.draw_labels(rng.generator_labels, step),
            self._numbers([learning_rate(training.critic_optimizer, first + index) for index in iterations]),
            self._numbers([learning_rate(training.generator_optimizer, step)]),
            self._numbers([self.state.ema_weight(training.ema_decay)]),
        )

    def _numbers(self, values: list[float]) -> list[float] | Tensor:
        """A graph reads them from the device's memory."""
        return torch.tensor(values, device=self.runtime.device) if self.config.runtime.cuda_graph else values

    def draw(self, draw: Callable[..., Tensor], *arguments: int) -> Tensor:
        """This rank's rows of a global draw, on the device in the networks' dtype."""
        rows = draw(self.config.training.seed, *arguments, self.rows)
        return self._to_device(rows).to(self.interval.dtype)

    def draw_labels(self, draw: Callable[..., Tensor], *counters: int) -> Tensor:
        """This rank's rows of a global draw of classes, on the device; all 0 without classes."""
        training = self.config.training
        num_classes = self.state.generator.num_classes or 1
        labels = draw(training.seed, *counters, training.batch_size, num_classes, self.rows)
        return self._to_device(labels)

    def _to_device(self, values: Tensor) -> Tensor:
        if self.runtime.device.type == "cuda":
            values = values.pin_memory()  # or the copy would wait for the device
        return values.to(self.runtime.device, non_blocking=True)

    # -- cadence -------------------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.state.step % every == 0 or self.state.step == self.config.training.steps)

    def _check_losses(self) -> None:
        losses = self.interval.losses()
        if not (finite := losses.isfinite().all(dim=1)).all():
            first = self.state.step - len(losses) + 1 + int(finite.logical_not().nonzero()[0])
            self._fail(f"step {first}: the loss is not finite")

    def _log(self) -> dict[str, str]:
        """Writes a line of metrics; returns what the progress bar shows."""
        losses = self.interval.losses()
        real_loss, fake_loss, generator_loss = losses.mean(0).tolist()
        seconds, wait_seconds = self.interval.seconds()
        self.elapsed_seconds += seconds
        training = self.config.training
        line = {
            "step": self.state.step,
            "critic_loss": (real_loss + fake_loss) / 2,
            "generator_loss": generator_loss,
            **self._critic_health(),
            "images_per_second": len(losses) * training.n_critic * training.batch_size / seconds,
            "data_wait_seconds": wait_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "evaluation_seconds": self.evaluation_seconds,
        }
        if self.objective.estimates_wasserstein:
            line["wasserstein_estimate"] = -(real_loss + fake_loss)
        if self.runtime.is_main:
            with self._tolerated("metrics"), (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        with self._tolerated("trackers"):
            self.runtime.accelerator.log(
                {key: value for key, value in line.items() if key != "step"}, step=self.state.step
            )
        self.interval.begin()
        return {"critic": f"{line['critic_loss']:.4f}", "generator": f"{generator_loss:.4f}"}

    def _critic_health(self) -> dict[str, float]:
        """Equal on all ranks: gradients are all-reduced and weights are replicas."""
        parameters = list(self.state.critic.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        health = {"critic_grad_norm": torch.nn.utils.get_total_norm(gradients).item()}
        if (clip_value := self.config.training.clip_value) is not None:
            bound = torch.tensor(clip_value, dtype=self.interval.dtype, device=self.runtime.device)
            clipped = sum(int((parameter.detach().abs() >= bound).sum()) for parameter in parameters)
            health["clipped_fraction"] = clipped / sum(parameter.numel() for parameter in parameters)
        return health

    def save(self) -> None:
        """Starts a checkpoint, and notices how the one before it ended."""
        self._note_outcome(
            lambda: self.writer.save(
                self.state.tensors(),
                self.state.step,
                {
                    "elapsed_seconds": self.elapsed_seconds,
                    "evaluation_seconds": self.evaluation_seconds,
                    "generator": self.state.generator.spec(),
                },
            )
        )
        self._comment()

    def _comment(self, *, last: bool = False) -> None:
        self.runtime.comment(f"step {self.state.step} of {self.config.training.steps}{self.scores}", last=last)

    def _save_now(self) -> None:
        """Makes sure that this very step is on the disk."""
        self._note_outcome(self.writer.finish)
        if self.writer.committed_step != self.state.step:
            self.save()
            self._note_outcome(self.writer.finish)
        if self.writer.committed_step != self.state.step:
            self._fail(f"step {self.state.step} could not be saved")

    def _note_outcome(self, save: Callable[[], None]) -> None:
        """A save that fails is reported and tried again at the next cadence, up to run.max_save_failures in a row.

        Every rank sees the same outcome at the same step, so they stay in step.
        """
        try:
            save()
        except IntegrityError as error:
            self._fail(f"step {self.state.step}: must not be saved, {error}")
        except OSError as error:
            failures, allowed = self.writer.failures_in_a_row, self.config.run.max_save_failures
            self.runtime.say(f"checkpoint failed ({failures} in a row, {allowed} tolerated): {error}")
            if failures > allowed:
                self._fail(f"checkpoints can't be written: {error}")

    def _fail(self, reason: str) -> NoReturn:
        with contextlib.suppress(OSError, IntegrityError):
            self.writer.finish()
        committed = self.writer.committed_step
        kept = f"the last good checkpoint is step {committed}" if committed else "there is no checkpoint yet"
        raise TrainingFailed(f"{reason}; {kept}")

    def _sample_and_evaluate(self) -> None:
        """Idempotent: what exists already for this step is left alone."""
        state, generator = self.state, self._scored_generator()
        grid = self.folder / "samples" / f"{state.step:05d}.png"
        if state.step and self._due(self.config.run.sample_every) and self.runtime.is_main and not grid.exists():
            with self._tolerated("samples"):
                images, columns = sample_grid(generator, self.config.training.seed)
                save_grid(images, grid, columns)
        if self.scorer is None or not state.step or not self._due(self.config.evaluation.every):
            return
        started = time.monotonic()
        result = self.folder / "evaluation" / f"step-{state.step:08d}.json"
        if not self.runtime.on_main(result.exists):
            try:
                with self._tolerated("evaluation"):
                    facts = {"step": state.step, "weights": self.config.evaluation.weights}
                    scores = self.scorer.score_generator(generator, result, facts)["features"]
                    fids = (f", {name} FID {found['fid']:.2f}" for name, found in scores.items())
                    self.scores = f"{''.join(fids)} at step {state.step}"
                    self._comment()
            except Preempted:
                if self._due(self.config.run.log_every) and self.interval.steps:
                    self._log()
                self._stop()
        self.evaluation_seconds += time.monotonic() - started
        self.interval.exclude(time.monotonic() - started)

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """A full or lost disk costs what was to be written, never the run: checkpoints decide when to give up."""
        try:
            yield
        except OSError as error:
            self.runtime.say(f"step {self.state.step}: {what} not written: {error}")

    def _scored_generator(self) -> Generator:
        if self.config.evaluation.weights == "ema":
            return self.state.ema
        self.state.generator.eval()
        return self.state.generator

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def _open_folder(self) -> None:
        environment = self.runtime.environment() | {
            "dataset": self.dataset.name,
            "dataset_fingerprint": self.dataset.fingerprint,
        }
        self.runtime.on_main(self._take_lock)
        self.runtime.on_main(lambda: self._describe(environment))
        if self.config.run.trackers:
            settings = {
                key: value if isinstance(value, int | float | str) else str(value)
                for key, value in flatten(self.config).items()
            }
            self.runtime.accelerator.init_trackers(self.config.run.name, settings)

    def _describe(self, environment: dict[str, Any]) -> None:
        # In this order: a folder with a config.yaml is a run (check_run_folder).
        write_text(self.folder / "environment.json", json.dumps(environment, indent=1))
        write_text(self.folder / "config.yaml", to_yaml(self.config))
        sweep(self.folder / "checkpoints")

    def _take_lock(self) -> None:
        self.lock = RunLock(self.folder)

    def _resume(self) -> None:
        checkpoint, damaged = self.runtime.on_main(lambda: newest_intact(self.folder / "checkpoints"))
        for line in damaged:
            self.runtime.say(f"skipped a damaged checkpoint: {line}")
        if checkpoint is None:
            self.runtime.on_main(lambda: trim_metrics(self.folder / "metrics.jsonl", 0))
            return
        self.state.load(checkpoint.tensors(), checkpoint.step)
        self.elapsed_seconds = checkpoint.progress["elapsed_seconds"]
        self.evaluation_seconds = checkpoint.progress["evaluation_seconds"]
        self.writer.committed_step = checkpoint.step
        self.runtime.on_main(lambda: trim_metrics(self.folder / "metrics.jsonl", checkpoint.step))
        self.runtime.say(f"going on from {checkpoint.folder}, written by {checkpoint.world_size} process(es)")

    def _stop(self) -> None:
        self._save_now()
        raise Preempted(f"stopped after step {self.state.step}, which is saved: the same command goes on from there")

    def _finish(self) -> None:
        self._comment(last=True)
        generator, step = self._scored_generator(), self.state.step
        provenance = {"run": self.config.run.name, "step": step, "dataset": self.dataset.fingerprint}
        save_export(generator, self.folder / "export" / "generator.safetensors", provenance)
        strip = self.folder / "samples" / f"{step:05d}-interpolation.png"
        save_grid(interpolate(generator, self.config.training.seed, 4, 10), strip, columns=10)
        self.runtime.say(f"report: {write_report(self.folder)}")


class Interval:
    """What happened since the last line of metrics: losses stay on the device until they are asked for."""

    def __init__(self, runtime: Runtime, dtype: torch.dtype) -> None:
        self._runtime, self.dtype = runtime, dtype
        self.begin()

    def begin(self) -> None:
        self._rows: list[Tensor] = []
        self._losses: Tensor | None = None
        self._started, self._wait_seconds = time.monotonic(), 0.0

    @property
    def steps(self) -> int:
        return len(self._rows)

    def add(self, losses: Tensor) -> None:
        self._rows.append(losses)
        self._losses = None

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        started = time.monotonic()
        try:
            batch = next(batches)
        except UserError as error:
            raise LocalError(str(error)) from None
        self._wait_seconds += time.monotonic() - started
        return batch

    def exclude(self, seconds: float) -> None:
        self._started += seconds

    def losses(self) -> Tensor:
        """(steps, 3) on the CPU: real, fake and generator loss of the global batch. This waits for the device."""
        if self._losses is None:
            self._losses = self._runtime.mean_over_ranks(torch.stack(self._rows)).cpu()
        return self._losses

    def seconds(self) -> tuple[float, float]:
        """Training time of the interval and the part of it spent waiting for data."""
        return time.monotonic() - self._started, self._wait_seconds


def check_run_folder(config: Config) -> dict[str, Any] | None:
    """The run's environment.json if the folder holds this very run, None if it is new.

    Raises:
        UserError: the folder holds something else, or a run with other hyper-parameters.
    """
    folder = config.folder
    contents = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not any(name for name in contents if not name.startswith(".") and name != "environment.json"):
        return None
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        environment = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{folder}: is not empty and holds no run that can be read: use another run.name") from None
    differences = []
    for key, value in flatten(config, free=False).items():
        before: Any = saved
        for part in key.split("."):
            before = before.get(part) if isinstance(before, dict) else None
        if before != (list(value) if isinstance(value, tuple) else value):
            differences.append(f"{key} is {before} there and {value} here")
    if differences:
        raise UserError(
            f"{folder}: holds a run with other settings ({'; '.join(differences)}): "
            "give those settings, or another run.name"
        )
    return environment  # type: ignore[no-any-return]


def trim_metrics(path: Path, last_step: int) -> None:
    """Drops the lines after `last_step`, which will be written again, and one that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Inverse-time decay, as Keras has it."""
    return config.learning_rate / (1 + config.decay * update)
