"""Progress bars on a terminal and in a notebook, and the lines that a log gets instead."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.compat import time_by_steady_clock

LOG_SECONDS = 60
"""The time between two lines where standard error is no terminal."""
BAR_COLUMNS, NAME_COLUMNS = 8, 14
"""The least width of the bar itself on a narrow terminal, and how much of a long name stays there."""


class _Lines:
    """A file for tqdm that writes whole lines: no carriage return, no movement of a cursor, no empty line."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            sys.stderr.write(f"{line}\n")


def _in_notebook() -> bool:
    """Returns whether this process is a notebook's kernel. That ipykernel is imported does not show it: tools that
    start kernels import it too."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _options() -> dict[str, Any]:
    """Returns tqdm's arguments for standard error: a bar, or a line a minute where that is a log."""
    if sys.stderr.isatty() or _in_notebook():
        return {"mininterval": 0.5, "dynamic_ncols": True}
    return {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 1, "ncols": 79, "file": _Lines()}


def bar(**options: Any) -> tqdm[Any]:
    """Returns a tqdm bar on standard error, or a notebook's; a log gets a line a minute, and none for less."""
    progress = tqdm(**_options(), **options)
    time_by_steady_clock(progress)
    return progress


class TrainingBar(tqdm):  # type: ignore[type-arg]
    """The bar of a run's steps. The remaining time includes the evaluations to come, each as long as those so far on
    average; before the first one it ends with a `+`.

    Args:
        every: steps between two evaluations; the last step has one too. None: there are none.
    """

    def __init__(self, total: int, initial: int, name: str, every: int | None, *, disable: bool) -> None:
        self._last_step, self._every = total, every
        self._evaluations, self._evaluation_seconds = 0, 0.0
        self.facts: dict[str, str] = {}
        """Values at the end of the bar, by name; the most important first."""
        options = _options()
        layout = "{desc}: {percentage:.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
        if "file" in options:
            layout = "{desc}: step {n_fmt} of {total_fmt}, {elapsed} passed, {left} left, {rate_fmt}{postfix}"
            options["ncols"] = None  # a line without a bar needs no width, which would cut its numbers
        options |= {"miniters": 1, "bar_format": layout, "disable": disable}
        super().__init__(total=total, initial=initial, desc=name, unit="step", **options)
        time_by_steady_clock(self)

    def add_evaluation(self, seconds: float) -> None:
        """Counts an evaluation, whose seconds are not the steps'."""
        self._evaluations += 1
        self._evaluation_seconds += seconds

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's values of the layout's fields, with as many facts and as much of the name as the terminal is wide."""
        fields = dict(super().format_dict)
        seconds = fields["elapsed"] - self._evaluation_seconds
        fields["rate"] = (self.n - self.initial) / seconds if seconds > 0 else None
        fields["left"] = self._remaining(fields["rate"])
        facts = [f"{key} {value}" for key, value in self.facts.items()]
        short = self.desc if len(self.desc) <= NAME_COLUMNS else f"{self.desc[:NAME_COLUMNS]}.."
        for name, shown in [(self.desc, facts), *((short, facts[:count]) for count in range(len(facts), -1, -1))]:
            fields |= {"prefix": name, "postfix": ", ".join(shown)}
            if self._fits(fields):
                break
        return fields

    def _fits(self, fields: dict[str, Any]) -> bool:
        layout, _, rest = fields["bar_format"].partition("{bar}")
        if not rest or not isinstance(fields["ncols"], int):  # a line of a log, a notebook's widget
            return True
        text = tqdm.format_meter(**fields | {"bar_format": layout + rest, "ncols": None})
        return len(text) + BAR_COLUMNS <= fields["ncols"]

    def _remaining(self, rate: float | None) -> str:
        if not rate:
            return "?"
        step, evaluations = int(self.n), 0
        seconds = (self._last_step - step) / rate
        if self._every is not None and step < self._last_step:
            evaluations = -(-self._last_step // self._every) - step // self._every
        if evaluations and not self._evaluations:
            return f"{tqdm.format_interval(seconds)}+"
        average = self._evaluation_seconds / max(self._evaluations, 1)
        return tqdm.format_interval(seconds + evaluations * average)


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def messages_above_bars() -> Iterator[None]:
    """Prints Python's warnings and the log lines of libraries above the bars within the block, not into them."""

    def show(message: Warning | str, category: type[Warning], name: str, line: int, *rest: Any) -> None:
        tqdm.write(warnings.formatwarning(message, category, name, line).rstrip(), file=sys.stderr)

    loggers = [
        logger
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        if isinstance(logger, logging.Logger)
        and any(getattr(handler, "stream", None) in (sys.stderr, sys.stdout) for handler in logger.handlers)
    ]
    last_resort, logging.lastResort = logging.lastResort, _AboveBars(logging.WARNING)
    try:
        with warnings.catch_warnings(), logging_redirect_tqdm(loggers):
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logging.lastResort = last_resort
