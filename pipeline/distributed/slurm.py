"""The Slurm job around this process, where there is one: its number, its comment, its time."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time

COMMENT_SECONDS = 10
"""Least time between two updates of a job's comment."""


def job_id() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


class JobComment:
    """The comment of the job, as `scontrol show job` shows it; nothing outside of Slurm."""

    def __init__(self) -> None:
        self._last: tuple[float, subprocess.Popen[bytes]] | None = None

    def set(self, text: str, *, last: bool = False) -> None:
        """Nobody waits for it or hears of its failure: a site may forbid it.

        A text that comes sooner than COMMENT_SECONDS after another, or while that is still on its way, is dropped
        unless it is the `last`.
        """
        job, now = job_id(), time.monotonic()
        if job is None:
            return
        if self._last is not None and not last:
            then, process = self._last
            if process.poll() is None or now - then < COMMENT_SECONDS:
                return
        command = ["scontrol", "update", f"JobId={job}", f"Comment={text}"]
        with contextlib.suppress(OSError):
            nowhere = subprocess.DEVNULL
            self._last = now, subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def job_seconds_left() -> float | None:
    """What the job's time limit leaves; None outside of Slurm, without a limit, or where Slurm won't say."""
    job = job_id()
    if job is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        left = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)  # or UNLIMITED, NOT_SET, INVALID
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
