"""Progress bars on a terminal and in a notebook, and what stands in their place in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.compat import time_by_steady_clock

LOG_SECONDS = 60
"""Between two lines where standard error is no terminal."""
BAR_COLUMNS, NAME_COLUMNS = 8, 14
"""What a narrow terminal leaves of a bar at least, and of a long name."""


class _Lines:
    """A file for tqdm that gets whole lines: no carriage return, no movement of a cursor, no empty line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()


def _in_notebook() -> bool:
    """Says whether this process is a notebook's kernel. Tools that start kernels import ipykernel too, so that its
    import says nothing."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _options() -> dict[str, Any]:
    if sys.stderr.isatty() or _in_notebook():
        return {"mininterval": 0.5, "dynamic_ncols": True}
    return {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 1, "ncols": 79, "file": _Lines(sys.stderr)}


def bar(**options: Any) -> tqdm[Any]:
    """tqdm on standard error, or a notebook's. Anywhere else: a line a minute, and none of what takes less."""
    shown = tqdm(**_options(), **options)
    time_by_steady_clock(shown)
    return shown


class TrainingBar(tqdm):  # type: ignore[type-arg]
    """The bar of a training's steps. What is left includes its evaluations, each as long as those so far; while none
    has been seen, the time has a `+` behind it.

    Args:
        every: steps between two evaluations; the last step has one too. None: there are none.
    """

    def __init__(self, total: int, initial: int, name: str, every: int | None, *, disable: bool) -> None:
        self._last_step, self._every = total, every
        self._evaluations, self._evaluation_seconds = 0, 0.0
        self.facts: dict[str, str] = {}
        """What stands at its end, by name; the most important first."""
        options = _options()
        layout = "{desc}: {percentage:.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
        if "file" in options:
            layout = "{desc}: step {n_fmt} of {total_fmt}, {elapsed} passed, {left} left, {rate_fmt}{postfix}"
        options |= {"miniters": 1, "bar_format": layout, "disable": disable}
        super().__init__(total=total, initial=initial, desc=name, unit="step", **options)
        time_by_steady_clock(self)

    def add_evaluation(self, seconds: float) -> None:
        """Takes an evaluation out of the time of the steps."""
        self._evaluations += 1
        self._evaluation_seconds += seconds

    @property
    def format_dict(self) -> dict[str, Any]:
        shown = dict(super().format_dict)
        seconds = shown["elapsed"] - self._evaluation_seconds
        shown["rate"] = (self.n - self.initial) / seconds if seconds > 0 else None
        facts = [f"{key} {value}" for key, value in self.facts.items()]
        shown["left"] = self._left(shown["rate"])
        short = self.desc if len(self.desc) <= NAME_COLUMNS else f"{self.desc[:NAME_COLUMNS]}.."
        for name, kept in [(self.desc, facts), *((short, facts[:count]) for count in range(len(facts), -1, -1))]:
            shown |= {"prefix": name, "postfix": ", ".join(kept)}
            if self._fits(shown):
                break
        return shown

    def _fits(self, shown: dict[str, Any]) -> bool:
        layout, _, rest = shown["bar_format"].partition("{bar}")
        if not rest or not isinstance(shown["ncols"], int):  # a line of a log, a notebook's widget
            return True
        text = tqdm.format_meter(**shown | {"bar_format": layout + rest, "ncols": None})
        return len(text) + BAR_COLUMNS <= shown["ncols"]

    def _left(self, rate: float | None) -> str:
        if not rate:
            return "?"
        step, coming = int(self.n), 0
        seconds = (self._last_step - step) / rate
        if self._every is not None and step < self._last_step:
            coming = -(-self._last_step // self._every) - step // self._every
        if coming and not self._evaluations:
            return f"{tqdm.format_interval(seconds)}+"
        each = self._evaluation_seconds / max(self._evaluations, 1)
        return tqdm.format_interval(seconds + coming * each)


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def messages_above_bars() -> Iterator[None]:
    """Python's warnings and the log lines of libraries come above the bars in the meantime, not within them."""

    def show(message: Warning | str, category: type[Warning], name: str, line: int, *rest: Any) -> None:
        tqdm.write(warnings.formatwarning(message, category, name, line).rstrip(), file=sys.stderr)

    every = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    streams = {each: [getattr(handler, "stream", None) for handler in each.handlers] for each in every}
    loggers = [each for each, found in streams.items() if sys.stderr in found or sys.stdout in found]
    last_resort, logging.lastResort = logging.lastResort, _AboveBars(logging.WARNING)
    try:
        with warnings.catch_warnings(), logging_redirect_tqdm(loggers):
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logging.lastResort = last_resort
