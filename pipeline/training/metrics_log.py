"""What a run tells of its training: a line of metrics an interval, in metrics.jsonl and the trackers."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from pipeline.config import TrainingConfig
from pipeline.data import Dataset
from pipeline.distributed.process import Runtime
from pipeline.storage.run_folder import RunFolder
from pipeline.training.rank_times import RankTimes
from pipeline.training.state import TrainingState


class MetricsLog:
    """Losses stay on the device until an interval ends: one wait for the device, one reduction over the ranks."""

    def __init__(self, training: TrainingConfig, state: TrainingState, runtime: Runtime, folder: RunFolder) -> None:
        self._training, self._state, self._runtime, self._folder = training, state, runtime, folder
        self.elapsed_seconds = self.evaluation_seconds = 0.0
        """Of the whole run, over all its launches; training alone, evaluation alone: of a step after its line."""
        self._rank_times = RankTimes(training, state, runtime)
        self.begin()

    def introduce(self, dataset: Dataset) -> None:
        """A line about what trains: ranks, device, images, networks."""
        shape, count = "x".join(map(str, dataset.image_shape)), dataset.num_images("train")
        networks = {"generator": self._state.generator, "critic": self._state.critic}
        sizes = (f"{name} {sum(w.numel() for w in each.parameters()):,}" for name, each in networks.items())
        self._runtime.say(f"{self._runtime}; {count:,} images of {shape}; parameters: {', '.join(sizes)}")

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
        if self._reduced is None:
            self._reduced = self._runtime.ranks.mean(torch.stack(self._losses)).cpu()
        return self._reduced

    def first_step_not_finite(self) -> int | None:
        """The first step of the interval with a loss that is no finite number."""
        finite = self.losses().isfinite().all(dim=1)
        return None if finite.all() else self._state.step - len(finite) + 1 + int(finite.logical_not().nonzero()[0])

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
            **self._critic_health(),
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
        self.begin()
        return {"critic": f"{line['critic_loss']:.4f}", "generator": f"{generator_loss:.4f}"}

    def _critic_health(self) -> dict[str, float]:
        """Equal on all ranks: gradients are all-reduced and weights are replicas."""
        parameters = list(self._state.critic.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        health = {"critic_grad_norm": torch.nn.utils.get_total_norm(gradients).item()}
        if (clip_value := self._training.clip_value) is not None:
            bound = parameters[0].detach().new_tensor(clip_value)
            clipped = sum(int((parameter.detach().abs() >= bound).sum()) for parameter in parameters)
            health["clipped_fraction"] = clipped / sum(parameter.numel() for parameter in parameters)
        return health
