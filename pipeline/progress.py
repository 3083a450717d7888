"""Progress bars that suit a terminal, a notebook and a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def bar(**options: Any) -> tqdm[Any]:
    """tqdm on standard error, or a notebook's widget; a file that collects a job's output gets a line every ten
    seconds, not ten a second."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(mininterval=0.5 if watched else 10, **options)
