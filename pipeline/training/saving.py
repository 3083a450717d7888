"""When a checkpoint may fail, and when that ends the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline.config import Config
from pipeline.distributed.process import Runtime
from pipeline.errors import TrainingFailed
from pipeline.storage.checkpoint import CheckpointWriter, IntegrityError
from pipeline.storage.run_folder import RunFolder
from pipeline.training.state import TrainingState


class Saver:
    """Saves a run's state beside the training.

    A save that fails is reported and tried again at the next cadence, up to run.max_save_failures in a row. Every rank
    sees the same outcome at the same step, so the ranks stay in step.

    Args:
        progress: returns what a resumed run needs beside the state, as JSON-serialisable values.
        damage: returns why this rank must not save, whatever its state is, as a message; None: it may.
        best_of: returns which of some steps has the best checkpoint, to keep it; None: none of them.

    Its methods raise TrainingFailed on all ranks when the state must not be saved or saving has failed too often.
    """

    def __init__(
        self,
        config: Config,
        state: TrainingState,
        runtime: Runtime,
        progress: Callable[[], dict[str, Any]],
        damage: Callable[[], str | None],
        best_of: Callable[[list[int]], int | None],
    ) -> None:
        self._state, self._runtime, self._progress, self._damage = state, runtime, progress, damage
        self._allowed_failures = config.run.max_save_failures
        self.writer = CheckpointWriter(
            RunFolder(config.folder),
            runtime.ranks,
            keep_last=config.run.keep_last,
            keep_every=config.run.keep_every,
            clip_value=config.training.clip_value,
            best_of=best_of,
        )
        self._reported_step: int | None = None

    def begin(self, step: int) -> None:
        """Goes on from the checkpoint of this step."""
        self.writer.committed_step = self._reported_step = step

    def report(self) -> None:
        """Prints a line about a checkpoint that was completed since the last call."""
        if (step := self.writer.committed_step) != self._reported_step:
            self._reported_step = step
            self._runtime.print(f"step {step}: saved")

    def save(self) -> None:
        """Starts a checkpoint, after noting how the one before it ended."""
        state = self._state
        self._note_outcome(lambda: self.writer.save(state.tensors(), state.step, self._progress(), self._damage()))

    def save_now(self) -> None:
        """Returns when the present step is on the disk."""
        self._note_outcome(self.writer.finish)
        if self.writer.committed_step != self._state.step:
            self.save()
            self._note_outcome(self.writer.finish)
        if self.writer.committed_step != self._state.step:
            self.fail(f"step {self._state.step} could not be saved")
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
            self.fail(f"step {self._state.step}: must not be saved, {error}")
        except OSError as error:
            failures, allowed = self.writer.failures_in_a_row, self._allowed_failures
            self._runtime.print(f"checkpoint failed ({failures} in a row, {allowed} tolerated): {error}")
            if failures > allowed:
                self.fail(f"checkpoints can't be written: {error}")
