"""Which rank is slow, although all of them take a step in the same time."""

from __future__ import annotations

import os
import statistics
import time

import torch

from pipeline.config import TrainingConfig
from pipeline.distributed.cpu import ThreadClock
from pipeline.distributed.process import Runtime
from pipeline.training.state import TrainingState

SLOW = 1.5
"""Times the median of the ranks."""
PROBE_IMAGES, PROBE_PASSES = 256, 3


class RankTimes:
    """The seconds a step that each rank is at work itself. Nothing is measured in a process alone.

    Ranks wait for each other in every collective, so by the clock each is as slow as the slowest. On a CPU a rank that
    waits for another sleeps: its own time is what its thread ran or waited for a core. On a GPU that wait looks like
    work, so there a rank times passes of the critic in which no other takes part, and an update of the critic counts as
    six of them (real and fake images, a backward pass is worth two). The wait for data comes on top; reading that a
    rank's own thread does is counted twice.
    """

    def __init__(self, training: TrainingConfig, state: TrainingState, runtime: Runtime) -> None:
        self._training, self._state, self._runtime = training, state, runtime
        self._clock = ThreadClock() if runtime.ranks.world_size > 1 and runtime.device.type == "cpu" else None
        self._slowest, self._slow_intervals = 0, 0
        self.begin()

    def begin(self) -> None:
        """Begins an interval."""
        self._scheduled_seconds = 0.0
        self.leave_out()

    def leave_out(self) -> None:
        """What came since the last step is no part of the training."""
        self._mark = self._clock.seconds() if self._clock else 0.0

    def add_step(self) -> None:
        """Counts what came since the last step, at the end of one."""
        before = self._mark
        self.leave_out()
        self._scheduled_seconds += self._mark - before

    def compare(self, step: int, steps: int, wait_seconds: float) -> dict[str, float]:
        """Figures of an interval of `steps` that ends with `step`: the least and the greatest of the ranks' own seconds
        a step, and whose the greatest are. A rank that is slow for two intervals in a row is told of, once.

        Args:
            wait_seconds: this rank's, for data, in the interval.
        """
        ranks = self._runtime.ranks
        if ranks.world_size == 1:
            return {}
        waited = wait_seconds / steps
        updates = self._training.critic_iterations(step - steps, step) / steps
        own = waited + (self._scheduled_seconds / steps if self._clock else updates * self._probe())
        all_own, all_waited, hosts = zip(*ranks.gather((own, waited, os.uname().nodename)), strict=True)
        slowest, median = max(range(ranks.world_size), key=all_own.__getitem__), statistics.median_low(all_own)
        is_slow = all_own[slowest] > SLOW * median
        self._slow_intervals = is_slow * (1 + self._slow_intervals * (slowest == self._slowest))
        self._slowest = slowest
        if self._slow_intervals == 2:
            self._runtime.print(
                f"step {step}: rank {slowest} on {hosts[slowest]} is slow, the others wait for it: "
                f"{all_own[slowest]:.3g} s of its own a step, of which it waits {all_waited[slowest]:.3g} s for data; "
                f"the median of the ranks is {median:.3g} s"
            )
        return {"rank_seconds_min": min(all_own), "rank_seconds_max": max(all_own), "slowest_rank": slowest}

    @torch.no_grad()
    def _probe(self) -> float:
        """Seconds that an update of the critic takes this rank's GPU, estimated while it has nothing to do."""
        # A copy in eval mode: batch norm, in a critic of the user's, neither waits for other ranks nor takes notice.
        critic, share = self._state.copied_critic(), self._training.batch_size // self._runtime.ranks.world_size
        count = min(share, PROBE_IMAGES)  # a pass must fit beside a training that hardly fits
        weight = next(critic.parameters())
        images = torch.zeros(count, *self._state.generator.image_shape, dtype=weight.dtype, device=weight.device)
        seconds = []
        for _ in range(PROBE_PASSES):
            torch.cuda.synchronize()
            started = time.perf_counter()
            with self._runtime.autocast():
                critic(images)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds) * share / count * 6
