"""What a run tells of its training: a line of metrics an interval, in metrics.jsonl and the trackers."""

from __future__ import annotations

import time
from collections import deque
from math import inf, isfinite
from statistics import median

import torch
from torch import Tensor

from pipeline.config import TrainingConfig
from pipeline.data import Dataset
from pipeline.distributed.process import Runtime
from pipeline.storage.run_folder import RunFolder
from pipeline.training.rank_times import RankTimes
from pipeline.training.state import TrainingState

RECENT_LINES, FEW_LINES, GROWTH = 20, 5, 1_000
"""Lines whose median gradient norm the next line's is compared with, the least number of them that tells what is usual,
and by how much a norm may exceed it before a person is warned."""


class MetricsLog:
    """Losses stay on the device until an interval ends: one wait for the device, one reduction over the ranks."""

    def __init__(self, training: TrainingConfig, state: TrainingState, runtime: Runtime, folder: RunFolder) -> None:
        self._training, self._state, self._runtime, self._folder = training, state, runtime, folder
        self.elapsed_seconds = self.evaluation_seconds = 0.0
        """Of the whole run, over all its launches; training alone, evaluation alone: of a step after its line."""
        self._rank_times = RankTimes(training, state, runtime)
        self._recent_norms = {name: deque[float](maxlen=RECENT_LINES) for name in ("critic", "generator")}
        self._growing = set[str]()
        """Networks whose gradients have been warned of, and are still as large."""
        self.begin()

    def introduce(self, dataset: Dataset) -> None:
        """A line about what trains: ranks, device, images, networks."""
        shape, count = "x".join(map(str, dataset.image_shape)), dataset.num_images("train")
        networks = {"generator": self._state.generator, "critic": self._state.critic}
        sizes = (f"{name} {sum(w.numel() for w in each.parameters()):,}" for name, each in networks.items())
        self._runtime.print(f"{self._runtime}; {count:,} images of {shape}; parameters: {', '.join(sizes)}")

    def begin(self) -> None:
        """Begins an interval."""
        self._losses: list[Tensor] = []
        self._reduced: Tensor | None = None
        self._started = time.monotonic()
        self._rank_times.begin()

    @property
    def has_steps(self) -> bool:
        """Whether the interval has any."""
        return bool(self._losses)

    def add(self, losses: Tensor) -> None:
        """A step's losses, (3,) on the device: real, fake and generator loss of this rank's images."""
        self._losses.append(losses)
        self._reduced = None
        self._rank_times.add_step()

    def add_evaluation(self, seconds: float) -> None:
        """Takes the time of an evaluation out of the interval's."""
        self.evaluation_seconds += seconds
        self._started += seconds
        self._rank_times.leave_out()

    def losses(self) -> Tensor:
        """(steps, 3) on the CPU: the losses of the global batches. This waits for the device."""
        return self._reduce()[:-1]

    def _gradient_norms(self) -> dict[str, float]:
        """Of all gradients of a network together, as its last update took them."""
        return dict(zip(self._recent_norms, self._reduce()[-1].tolist(), strict=False))

    def _reduce(self) -> Tensor:
        """(steps + 1, 3) on the CPU: the losses of the global batches, then the norms of the gradients of critic and
        generator. Those are equal on all ranks, unless one of them is faulty."""
        if self._reduced is None:
            norms = self._losses[-1].new_zeros(3)
            for index, network in enumerate((self._state.critic, self._state.generator)):
                gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
                norms[index] = torch.nn.utils.get_total_norm(gradients)
            self._reduced = self._runtime.ranks.mean(torch.stack([*self._losses, norms])).cpu()
        return self._reduced

    def fault(self) -> str | None:
        """Why the training must not go on, in words; None: it may. Equal on all ranks.

        Gradients of fp16 may overflow: the update is left out then, and the loss scale lowered.
        """
        step, finite = self._state.step, self.losses().isfinite().all(dim=1)
        if not finite.all():
            return f"step {step - len(finite) + 1 + int(finite.logical_not().nonzero()[0])}: the loss is not finite"
        for name, norm in self._gradient_norms().items():
            if not isfinite(norm) and not self._runtime.scaler.is_enabled():
                return f"step {step}: the norm of the {name}'s gradients is {norm}, although the losses are finite"
        return None

    def _warn_of_growth(self) -> None:
        """Says once that a network's gradients are far larger than they lately were.

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

    def write(self, wait_seconds: float, estimates_wasserstein: bool) -> dict[str, str]:
        """Ends the interval with a line, and begins the next; returns what the progress bar shows."""
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
            **self._rank_times.compare(step, len(losses), wait_seconds),
        }
        if estimates_wasserstein:
            line["wasserstein_estimate"] = -(real_loss + fake_loss)
        if self._runtime.ranks.is_main:
            with self._runtime.tolerating(f"step {step}: metrics"):
                self._folder.append_metrics(line)
        with self._runtime.tolerating(f"step {step}: trackers"):
            self._runtime.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)
        self._warn_of_growth()
        self.begin()
        return {"critic": f"{line['critic_loss']:.4f}", "generator": f"{generator_loss:.4f}"}

    def _clipped_share(self) -> dict[str, float]:
        """Equal on all ranks: weights are replicas."""
        if (clip_value := self._training.clip_value) is None:
            return {}
        parameters = [parameter.detach() for parameter in self._state.critic.parameters()]
        bound = parameters[0].new_tensor(clip_value)
        clipped = sum(int((parameter.abs() >= bound).sum()) for parameter in parameters)
        return {"clipped_fraction": clipped / sum(parameter.numel() for parameter in parameters)}
