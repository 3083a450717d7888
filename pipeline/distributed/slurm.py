"""The Slurm job around this process, if there is one: its number, its comment, its remaining time."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time

COMMENT_SECONDS = 10
"""The least time between two updates of a job's comment."""


def job_id() -> str | None:
    """Returns the number of the job; None outside of Slurm."""
    return os.environ.get("SLURM_JOB_ID")


def job_restarts() -> int:
    """Returns how often Slurm has queued the job again, as after the loss of a node. Its number stays the same."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


class JobComment:
    """The comment of the job, which `scontrol show job` shows; outside of Slurm it does nothing."""

    _process: subprocess.Popen[bytes] | None = None
    _started = 0.0

    def set(self, text: str, *, last: bool = False) -> None:
        """Starts an update of the comment, without waiting for it or noticing its failure: a site may forbid it.

        A text that comes sooner than COMMENT_SECONDS after another, or while that is still on its way, is dropped
        unless it is the `last`.
        """
        before, is_recent = self._process, time.monotonic() < self._started + COMMENT_SECONDS
        is_early = before is not None and (before.poll() is None or is_recent)
        if (job := job_id()) is None or (is_early and not last):
            return
        command, nowhere = ["scontrol", "update", f"JobId={job}", f"Comment={text}"], subprocess.DEVNULL
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
            self._started = time.monotonic()


def job_seconds_left() -> float | None:
    """Returns the seconds that the job's time limit leaves; None outside of Slurm, without a limit, or if Slurm does
    not answer."""
    if (job := job_id()) is None:
        return None
    command, remaining = ["squeue", "--noheader", "--jobs", job, "--format", "%L"], ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        remaining = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", remaining)  # or UNLIMITED, NOT_SET, INVALID
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
