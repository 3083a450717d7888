"""Progress bars that suit a terminal as well as a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(**options: Any) -> tqdm[Any]:
    """tqdm on standard error; a file that collects a job's output gets a line every ten seconds, not ten a second."""
    return tqdm(mininterval=0.5 if sys.stderr.isatty() else 10, **options)
