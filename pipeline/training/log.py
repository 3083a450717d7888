"""What a run records of its training: a line of metrics an interval, warnings, and a trace of some steps; and what
experiment trackers get beside the lines."""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.config import Config, RunConfig, TrainingConfig, flatten
from pipeline.data import Dataset
from pipeline.distributed.process import Runtime, open_tracker
from pipeline.errors import UserError
from pipeline.storage.files import replacing, write_text
from pipeline.storage.run_folder import RunFolder
from pipeline.training.state import TrainingState

RECENT_LINES, FEW_LINES, GROWTH = 20, 5, 1_000
"""A gradient norm is compared with the median of so many lines before it, if there are at least FEW_LINES; a person is
warned if it is more than GROWTH times as large."""
FORECAST_STEPS, LONG_SECONDS = (2, 12), 60
"""The steps of a launch between which its speed is measured, and the least time of a run that a person is told."""


class MetricsLog:
    """Collects the losses of an interval and writes its line into metrics.jsonl and the trackers.

    Losses stay on the device until the interval ends: then there is one wait for the device and one reduction over the
    ranks. All ranks call the same methods.
    """

    def __init__(self, training: TrainingConfig, state: TrainingState, runtime: Runtime, folder: RunFolder) -> None:
        self._training, self._state, self._runtime, self._folder = training, state, runtime, folder
        self.elapsed_seconds = self.evaluation_seconds = 0.0
        """Seconds of training alone and of evaluation alone, over all launches of the run, up to the last line."""
        self._recent_norms = {name: deque[float](maxlen=RECENT_LINES) for name in ("critic", "generator")}
        self._growing = set[str]()
        """Networks that have been warned of, whose gradients are still as large."""
        self.begin()

    def introduce(self, dataset: Dataset) -> None:
        """Prints what trains and where: objective, steps, folder; ranks, device, images, networks."""
        training, runtime = self._training, self._runtime
        runtime.print(f"{training.objective} on {dataset.name}, {training.steps:,} steps, in {self._folder.path}")
        shape, count = "x".join(map(str, dataset.image_shape)), dataset.num_images("train")
        sizes = (f"{name} {count:,}" for name, count in self._state.num_weights.items())
        runtime.print(f"{runtime}; {count:,} images of {shape}; parameters: {', '.join(sizes)}")

    def begin(self) -> None:
        """Begins an interval."""
        self._losses: list[Tensor] = []
        self._reduced: Tensor | None = None
        self._started = time.monotonic()

    @property
    def has_steps(self) -> bool:
        """Whether the interval has any steps."""
        return bool(self._losses)

    def add(self, losses: Tensor) -> None:
        """Adds a step's losses, (3,) on the device: real, fake and generator loss of this rank's images."""
        self._losses.append(losses)
        self._reduced = None

    def add_evaluation(self, seconds: float) -> None:
        """Takes the time of an evaluation, which has just ended, out of the interval's."""
        self.evaluation_seconds += seconds
        self._started += seconds

    def losses(self) -> Tensor:
        """Returns the losses of the global batches, (steps, 3) on the CPU. This waits for the device."""
        return self._reduce()[:-1]

    def fault(self) -> str | None:
        """Returns why the training must not go on, as a message, or None if it may. It is the same on all ranks.

        Under fp16 gradients may overflow: the scaler then skips the update and lowers the loss scale.
        """
        step, finite = self._state.step, self.losses().isfinite().all(dim=1)
        if not finite.all():
            return f"step {step - len(finite) + 1 + int(finite.logical_not().nonzero()[0])}: the loss is not finite"
        for name, norm in self._gradient_norms().items():
            if not isfinite(norm) and not self._runtime.scaler.is_enabled():
                return f"step {step}: the norm of the {name}'s gradients is {norm}, although the losses are finite"
        return None

    def write(self, wait_seconds: float, estimates_wasserstein: bool) -> dict[str, str]:
        """Writes the interval's line and begins the next interval.

        Args:
            wait_seconds: this rank's wait for data in the interval.
            estimates_wasserstein: see `Objective`.

        Returns:
            What the progress bar shows.
        """
        losses, training, step = self.losses(), self._training, self._state.step
        real_loss, fake_loss, generator_loss = losses.mean(0).tolist()
        seconds = time.monotonic() - self._started
        self.elapsed_seconds += seconds
        iterations = training.critic_iterations(step - len(losses), step)
        line = {
            "step": step,
            "critic_loss": (real_loss + fake_loss) / 2,
            "generator_loss": generator_loss,
            **{f"{name}_grad_norm": norm for name, norm in self._gradient_norms().items()},
            **self._clipped_share(),
            "images_per_second": iterations * training.batch_size / seconds,
            "data_wait_seconds": wait_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "evaluation_seconds": self.evaluation_seconds,
        }
        if estimates_wasserstein:
            line["wasserstein_estimate"] = -(real_loss + fake_loss)
        if self._runtime.ranks.is_main:
            with self._runtime.tolerating(f"step {step}: metrics"):
                self._folder.append_metrics(line)
        with self._runtime.tolerating(f"step {step}: trackers"):
            values = {_tracked(key): value for key, value in line.items() if key != "step"}
            self._runtime.accelerator.log(values, step=step)
        self._warn_of_growth()
        self.begin()
        return {"critic": f"{line['critic_loss']:.4f}", "generator": f"{generator_loss:.4f}"}

    def _reduce(self) -> Tensor:
        """Returns (steps + 1, 3) on the CPU: the losses of the global batches, then the norms of the critic's and the
        generator's gradients as their last updates took them. Norms are equal on all ranks, unless one is faulty."""
        if self._reduced is None:
            norms = self._losses[-1].new_zeros(3)
            for index, network in enumerate((self._state.critic, self._state.generator)):
                gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
                norms[index] = torch.nn.utils.get_total_norm(gradients)
            self._reduced = self._runtime.ranks.mean(torch.stack([*self._losses, norms])).cpu()
        return self._reduced

    def _gradient_norms(self) -> dict[str, float]:
        return dict(zip(self._recent_norms, self._reduce()[-1].tolist(), strict=False))

    def _warn_of_growth(self) -> None:
        """Warns once when a network's gradients are far larger than they have recently been.

        A clip, RMSprop and Adam hide the size of gradients from the weights: losses look right for hundreds of steps.
        """
        for name, norm in self._gradient_norms().items():
            usual = [value for value in self._recent_norms[name] if 0 < value < inf]
            self._recent_norms[name].append(norm)
            if len(usual) < FEW_LINES or not GROWTH * median(usual) < norm < inf:
                self._growing.discard(name)
            elif name not in self._growing:
                self._growing.add(name)
                self._runtime.print(
                    f"step {self._state.step}: the norm of the {name}'s gradients is {norm:.3g}, more than {GROWTH:,} "
                    f"times the median {median(usual):.3g} of the last {len(usual)} lines: if it goes on growing, "
                    "lower the learning rates"
                )

    def _clipped_share(self) -> dict[str, float]:
        """Returns which share of the critic's weights lies at the bounds of the clip, equal on all ranks."""
        if (clip_value := self._training.clip_value) is None:
            return {}
        parameters = [parameter.detach() for parameter in self._state.critic.parameters()]
        bound = parameters[0].new_tensor(clip_value)
        clipped = sum(int((parameter.abs() >= bound).sum()) for parameter in parameters)
        return {"clipped_fraction": clipped / sum(parameter.numel() for parameter in parameters)}


class Forecast:
    """Prints once, after the first dozen steps of a launch, about how long the others will take."""

    def __init__(self, training: TrainingConfig, runtime: Runtime, step: int) -> None:
        self._training, self._runtime = training, runtime
        self._first, self._last = (step + steps for steps in FORECAST_STEPS)

    def add_step(self, step: int) -> None:
        """Notes that a step is taken."""
        if step not in (self._first, self._last):
            return
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)  # twice in a launch: the host runs ahead of the device
        if step == self._first:
            self._started = time.monotonic()
            return
        left, seconds = self._training.steps - step, time.monotonic() - self._started
        seconds *= self._updates(step, self._training.steps) / self._updates(self._first, step)
        if left and seconds >= LONG_SECONDS:
            from pipeline.reporting import duration, number

            about = duration(seconds).replace("\u00a0", " ")  # a terminal may not have a page's space
            self._runtime.print(
                f"{left:,} steps at {number(seconds / left, 2)} s: about {about}, and evaluations; "
                "Ctrl-C saves, the same command goes on"
            )

    def _updates(self, first: int, stop: int) -> int:
        """Returns the number of updates in these steps: those of a burn-in have more, and take longer."""
        return self._training.critic_iterations(first, stop) + stop - first


def profiled(
    take_step: Callable[[], None], run: RunConfig, state: TrainingState, runtime: Runtime, folder: RunFolder
) -> Callable[[], None]:
    """Returns `take_step`, traced in the steps that `run.profile` names: what each operation took on CPU and GPU.

    After the last one every rank writes a file in Chrome's format, compressed. A run that goes on from a step among or
    after them is not traced, so that the same command can be queued again.
    """
    if run.profiled_steps is None:
        return take_step
    first, last = run.profiled_steps
    if state.step >= first:
        runtime.print(f"run.profile is {run.profile}, but the run goes on from step {state.step}: no trace")
        return take_step
    on_gpu = [ProfilerActivity.CUDA] if runtime.device.type == "cuda" else []
    profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True, acc_events=True)

    def take_traced_step() -> None:
        step = state.step + 1
        if step == first:
            profiler.start()
        with record_function(f"step {step}"):
            take_step()
        if step == last:
            profiler.stop()
            with runtime.tolerating(f"steps {first} to {last}: profile"):
                path = folder.profile(first, last, runtime.ranks.rank)
                with replacing(path) as temporary, NamedTemporaryFile(suffix=".json.gz") as trace:
                    profiler.export_chrome_trace(trace.name)  # compressed because of the name's end
                    shutil.copyfile(trace.name, temporary)
                runtime.print(f"profile: {path} opens in ui.perfetto.dev or chrome://tracing")

    return take_traced_step


class Trackers:
    """The trackers of run.trackers. To accelerate's numbers it adds settings, scores, images, and each tracker's way to
    continue a run. All ranks may call its methods; only the main rank tracks."""

    def __init__(self, config: Config, runtime: Runtime, folder: RunFolder) -> None:
        self._config, self._runtime, self._folder = config, runtime, folder

    def begin(self, step: int) -> None:
        """Opens the trackers of a run that goes on after `step`; at 0 they get its settings.

        What they hold of later steps comes again, so TensorBoard is made to drop it.

        Raises:
            UserError: a tracker can't be opened, as wandb where nobody is logged in.
        """
        self._first_step = step + 1
        if self._config.run.trackers:
            self._runtime.ranks.on_main(lambda: self._open(step))

    def log_scores(self, step: int, *, is_new: bool) -> None:
        """Logs the scores of an evaluation, as `score/SPACE/SCORE`, from its file in the run's folder.

        Args:
            is_new: False if the file is older than this launch. Then the trackers have its scores, unless they are of a
                step that they were made to drop.
        """
        from pipeline.reporting.read import read_evaluation

        path = self._folder.scores(step)
        if self._wants(path, step, is_new) and (evaluation := read_evaluation(path, [])):
            with self._runtime.tolerating(f"step {step}: trackers"):
                scores = {_tracked(name): value for name, value in evaluation.scores.items()}
                self._runtime.accelerator.log(scores, step=step)

    def log_grid(self, step: int, *, is_new: bool) -> None:
        """Logs the grid of samples from its file, where accelerate's tracker takes images or files."""
        path = self._folder.grid(step)
        if self._wants(path, step, is_new):
            with self._runtime.tolerating(f"step {step}: trackers"):
                for tracker in self._runtime.accelerator.trackers:
                    _log_image(tracker, path, step)

    def _wants(self, path: Path, step: int, is_new: bool) -> bool:
        return bool(self._runtime.accelerator.trackers) and (is_new or step >= self._first_step) and path.exists()

    def _open(self, step: int) -> None:
        run, folder, identities = self._config.run, self._folder, self._read_identities()
        for name in run.trackers:
            arguments = self._identify(name, identities, step) | run.tracker_options.get(name, {})
            write_text(folder.tracker_runs, json.dumps(identities))
            try:
                tracker = open_tracker(name, run.project, folder.trackers, arguments)
                self._runtime.accelerator.trackers.append(tracker)
                if step == 0:
                    _log_settings(tracker, self._config)
            except Exception as error:  # a tracker's package may raise anything
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"run.trackers: {name} can't be opened ({reason}); {folder.tracker_runs} says which run of it this "
                    "one goes on in, run.tracker_options what else it is given"
                ) from error
            if name == "mlflow":
                identities[name] = tracker.tracker.info.run_id
                write_text(folder.tracker_runs, json.dumps(identities))

    def _read_identities(self) -> dict[str, str]:
        """Returns the trackers' names of this run, which it got at its first launch."""
        try:
            identities = json.loads(self._folder.tracker_runs.read_text())
        except (OSError, ValueError):
            return {}
        return identities if isinstance(identities, dict) else {}

    def _identify(self, name: str, identities: dict[str, str], step: int) -> dict[str, Any]:
        """Returns the arguments with which a tracker continues the run that it has of this one."""
        run_name, place = self._config.run.name, str(self._folder.path)
        match name:
            case "tensorboard":
                return {"purge_step": step + 1}
            case "wandb":
                key = identities.setdefault(name, uuid4().hex)
                return {"name": run_name, "id": key, "resume": "allow", "dir": place}
            case "trackio":  # it knows a run by its name alone, and runs of other roots may have the same name
                unique = identities.setdefault(name, f"{run_name}-{uuid4().hex[:8]}")
                return {"name": unique, "resume": "allow"}
            case "mlflow":
                return {"run_id": identities[name]} if name in identities else {"run_name": run_name}
        return {}


def _tracked(key: str) -> str:
    """Returns the name in trackers, which show a group together, of a number of the log or a score SPACE/SCORE:
    loss/critic, grad_norm/critic, speed/images_per_second, critic/wasserstein_estimate, score/SPACE/SCORE."""
    if "/" in key:
        return f"score/{key.replace(':', '-')}"  # some trackers take no colon
    for group in ("loss", "grad_norm"):
        if (name := key.removesuffix(f"_{group}")) != key:
            return f"{group}/{name}"
    return f"speed/{key}" if "second" in key else f"critic/{key}"


def _log_settings(tracker: Any, config: Config) -> None:
    """Gives a tracker all settings, and TensorBoard's table, which has a column for each, those worth one."""
    settings = {
        key: item if isinstance(item, int | float | str) else str(item) for key, item in flatten(config).items()
    }
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(settings)
        return
    # accelerate would write them as a series of their own, named after the time. In the run's series TensorBoard shows
    # them beside its scores.
    from torch.utils.tensorboard.summary import hparams

    usual = flatten(Config()) | {"training.objective": None, "training.seed": None}
    columns = {key: settings[key] for key, value in flatten(config, free=False).items() if value != usual[key]}
    scores = {_tracked(f"{space}/{key}"): 0.0 for space in config.evaluation.features for key in ("fid", "is_mean")}
    for summary in hparams(columns, scores):  # type: ignore[no-untyped-call]
        tracker.tracker.file_writer.add_summary(summary)


def _log_image(tracker: Any, path: Path, step: int) -> None:
    import numpy as np
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    match tracker.name:
        case "tensorboard":
            tracker.log_images({"samples": np.asarray(image).transpose(2, 0, 1)[None]}, step=step)
        case "aim" | "clearml":
            tracker.log_images({"samples": image}, step=step)
        case "mlflow":
            tracker.log_artifact(str(path), path.parent.name)
        case _ if hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [image]}, step=step)
