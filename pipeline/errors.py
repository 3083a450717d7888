"""The ways in which a program can end badly, and their exit codes.

0: done. 1: a defect of the program, or a lost rank. 2: a mistake in the input. 3: the training diverged, or can't be
saved. 75 (EX_TEMPFAIL): stopped on request after saving; the same command goes on. 130: stopped at once by a second
SIGINT. 143: SIGTERM before there was anything to save.
"""

from __future__ import annotations

EXIT_RANK_LOST, EXIT_USER_ERROR, EXIT_FAILED, EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 75, 130, 143


class _Explained(Exception):
    """An error whose message is all that a person needs: IPython, which asks for this method, shows no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class UserError(_Explained):
    """A mistake in the input: the message names the key or file, the value and the fix."""


class LocalError(UserError):
    """An error that perhaps only this rank has met, like a damaged shard: each rank that raises it prints it."""


class TrainingFailed(_Explained):
    """The run cannot go on: it diverged, or its state cannot be saved. The last good checkpoint is kept."""


class RankLost(Exception):
    """Another rank did not come to a collective, or its connection is lost. The line about it is printed already."""


class Preempted(_Explained):
    """The run was asked to stop, and every rank knows that."""


def describe_error(error: Exception) -> str:
    """Returns an error of other people's code in one line: its type and the last line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1].strip()}"
