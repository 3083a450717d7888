"""What a run says of its training: a line of metrics an interval, warnings, a forecast, a trace of some steps."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from math import inf, isfinite
from statistics import median
from tempfile import NamedTemporaryFile
from typing import NoReturn

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.config import Config, TrainingConfig
from pipeline.distributed.process import Runtime
from pipeline.storage.files import replacing
from pipeline.storage.run_folder import RunFolder
from pipeline.training.state import TrainingState

RECENT_LINES, FEW_LINES, GROWTH = 20, 5, 1_000
"""A gradient norm is compared with the median of so many lines before it, if there are at least FEW_LINES; a person is
warned if it is more than GROWTH times as large."""
FORECAST_STEPS, LONG_SECONDS = (2, 12), 60
"""The steps of a launch between which its speed is measured, and the least time of a run that a person is told."""


class MetricsLog:
    """Collects the losses of an interval and writes its line into metrics.jsonl.

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

    def begin(self) -> None:
        """Begins an interval."""
        self._losses: list[Tensor] = []
        self._started = time.monotonic()

    @property
    def has_steps(self) -> bool:
        """Whether the interval has any steps."""
        return bool(self._losses)

    def add(self, losses: Tensor) -> None:
        """Adds a step's losses, (3,) on the device: real, fake and generator loss of this rank's images."""
        self._losses.append(losses)

    def add_evaluation(self, seconds: float) -> None:
        """Takes the time of an evaluation, which has just ended, out of the interval's."""
        self.evaluation_seconds += seconds
        self._started += seconds

    def losses(self) -> Tensor:
        """Returns the losses of the global batches, (steps, 3) on the CPU. This waits for the device."""
        return self._reduced()[:-1]

    def write(
        self, wait_seconds: float, estimates_wasserstein: bool, fail: Callable[[str], NoReturn]
    ) -> dict[str, float]:
        """Writes the interval's line and returns it.

        Args:
            wait_seconds: this rank's wait for data in the interval.
            estimates_wasserstein: see `Objective`.
            fail: ends the run, on all ranks, with a message that says why it must not go on.
        """
        reduced, training, step = self._reduced(), self._training, self._state.step
        losses, norms = reduced[:-1], dict(zip(self._recent_norms, reduced[-1].tolist(), strict=False))
        if fault := self._fault(losses, norms):
            fail(fault)
        real_loss, fake_loss, generator_loss = losses.mean(0).tolist()
        seconds = time.monotonic() - self._started
        self.elapsed_seconds += seconds
        iterations = training.critic_iterations(step - len(losses), step)
        line = {
            "step": step,
            "critic_loss": (real_loss + fake_loss) / 2,
            "generator_loss": generator_loss,
            **{f"{name}_grad_norm": norm for name, norm in norms.items()},
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
        self._warn_of_growth(norms)
        return line

    def _reduced(self) -> Tensor:
        """Returns (steps + 1, 3) on the CPU: the losses of the global batches, then the norms of the critic's and the
        generator's gradients as their last updates took them. Norms are equal on all ranks, unless one is faulty."""
        norms = self._losses[-1].new_zeros(3)
        for index, network in enumerate((self._state.critic, self._state.generator)):
            gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
            norms[index] = torch.nn.utils.get_total_norm(gradients)
        return self._runtime.ranks.mean(torch.stack([*self._losses, norms])).cpu()

    def _fault(self, losses: Tensor, norms: dict[str, float]) -> str | None:
        """Returns why the training must not go on, as a message, or None if it may. Under fp16 gradients may overflow:
        the scaler then skips the update and lowers the loss scale."""
        step, finite = self._state.step, losses.isfinite().all(dim=1)
        if not finite.all():
            return f"step {step - len(finite) + 1 + int(finite.logical_not().nonzero()[0])}: the loss is not finite"
        for name, norm in norms.items():
            if not isfinite(norm) and not self._runtime.scaler.is_enabled():
                return f"step {step}: the norm of the {name}'s gradients is {norm}, although the losses are finite"
        return None

    def _warn_of_growth(self, norms: dict[str, float]) -> None:
        """Warns once when a network's gradients are far larger than they have recently been.

        A clip, RMSprop and Adam hide the size of gradients from the weights: losses look right for hundreds of steps.
        """
        for name, norm in norms.items():
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
        weights = torch.cat([weight.detach().flatten() for weight in self._state.critic.parameters()])
        return {"clipped_fraction": (weights.abs() >= weights.new_tensor(clip_value)).sum().item() / len(weights)}


class Forecast:
    """Prints once, after the first dozen steps of a launch, about how long the others will take."""

    def __init__(self, config: Config, runtime: Runtime, step: int) -> None:
        self._config, self._runtime = config, runtime
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
        steps = self._config.training.steps
        seconds = (time.monotonic() - self._started) * self._updates(step, steps) / self._updates(self._first, step)
        if steps > step and seconds >= LONG_SECONDS:
            from pipeline.reporting import duration, number

            about = duration(seconds).replace("\u00a0", " ")  # a terminal may not have a page's space
            evaluations = ", and evaluations" if self._config.evaluation.every else ""
            self._runtime.print(
                f"{steps - step:,} steps at {number(seconds / (steps - step), 2)} s: about {about}{evaluations}; "
                "Ctrl-C saves, the same command goes on"
            )

    def _updates(self, first: int, stop: int) -> int:
        """Returns the number of updates in these steps: those of a burn-in have more, and take longer."""
        return self._config.training.critic_iterations(first, stop) + stop - first


def profiled(
    take_step: Callable[[], None], config: Config, state: TrainingState, runtime: Runtime
) -> Callable[[], None]:
    """Returns `take_step`, traced in the steps that `run.profile` names: what each operation took on CPU and GPU.

    After the last one every rank writes a file in Chrome's format, compressed. A run that goes on from a step among or
    after them is not traced, so that the same command can be queued again.
    """
    if config.run.profiled_steps is None:
        return take_step
    first, last = config.run.profiled_steps
    if state.step >= first:
        runtime.print(f"run.profile is {config.run.profile}, but the run goes on from step {state.step}: no trace")
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
                path = RunFolder(config.folder).profile(first, last, runtime.ranks.rank)
                with replacing(path) as temporary, NamedTemporaryFile(suffix=".json.gz") as trace:
                    profiler.export_chrome_trace(trace.name)  # compressed because of the name's end
                    shutil.copyfile(trace.name, temporary)
                runtime.print(f"profile: {path} opens in ui.perfetto.dev or chrome://tracing")

    return take_traced_step
