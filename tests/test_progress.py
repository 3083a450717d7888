"""What stands on a terminal and in a log while something goes on."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import select
import struct
import sys
import termios
import time
import warnings
from pathlib import Path
from typing import TextIO

import pytest

from pipeline.distributed import progress
from pipeline.distributed.progress import TrainingBar, bar, messages_above_bars


def as_log(monkeypatch: pytest.MonkeyPatch, seconds: int) -> io.StringIO:
    """Standard error that is no terminal, with a line every so many seconds."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
    return log


class Terminal:
    """Standard error that is a terminal of some width."""

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reader, writer = os.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        settings = termios.tcgetattr(writer)
        settings[1] &= ~termios.ONLCR
        termios.tcsetattr(writer, termios.TCSANOW, settings)
        self.stderr: TextIO = os.fdopen(writer, "w", closefd=False)  # like the real one, never closed
        monkeypatch.setattr(sys, "stderr", self.stderr)

    def lines(self) -> list[str]:
        """What is left to see of each line."""
        self.stderr.flush()
        text = b""
        while select.select([self._reader], [], [], 0.2)[0]:
            text += os.read(self._reader, 1 << 16)
        return [line.rpartition("\r")[2] for line in text.decode().rstrip("\n").split("\n")]


def has_run_for(shown: TrainingBar, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the bar's clock `seconds` after its start, at 0: the time since the machine's start would be rounded."""
    monkeypatch.setattr(shown, "start_t", 0.0)
    monkeypatch.setattr(shown, "_time", lambda: seconds)


def test_what_is_left_includes_the_evaluations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    as_log(monkeypatch, 60)
    with TrainingBar(1100, 100, "run", 300, disable=False) as shown:

        def left(step: int, seconds: float) -> str:
            shown.n = step
            has_run_for(shown, seconds, monkeypatch)
            return str(shown.format_dict["left"])

        assert left(100, 1) == "?"
        assert left(200, 50) == "07:30+"  # 900 steps of half a second; nobody knows what their evaluations take
        shown.add_evaluation(20)
        assert left(300, 120) == "07:40"  # 800 steps, 600, 900 and the last
        shown.add_evaluation(40)
        assert left(600, 310) == "05:10"  # 500 steps, 900 and the last, at 30 s
        assert left(1100, 600) == "00:00"


def test_a_clock_that_is_set_alters_neither_lines_nor_times(monkeypatch: pytest.MonkeyPatch) -> None:
    log, day = as_log(monkeypatch, 0), 86_400
    clock = iter([0, *[day] * 8, *[-day] * 100])
    monkeypatch.setattr("tqdm.std.time", lambda: time.time() + next(clock))
    with TrainingBar(20, 0, "run", None, disable=False) as shown:
        for _ in range(20):
            shown.update()
    told = re.findall(r"step ([1-9]\d*) of 20, (\S+) passed, (\S+) left", log.getvalue())
    assert {step for step, _, _ in told} == {str(step) for step in range(1, 21)}, log.getvalue()
    for _, passed, left in told:
        assert re.fullmatch(r"\d\d:\d\d", passed), "a day would be 24:00:00"
        assert re.fullmatch(r"\d\d:\d\d", left)


def test_a_log_gets_whole_lines_and_no_movement(monkeypatch: pytest.MonkeyPatch) -> None:
    log = as_log(monkeypatch, 0)
    name = "quickstart-with-another-rate"  # a whole line is longer than 79 columns
    with TrainingBar(4, 0, name, None, disable=False) as shown, bar(total=2, desc="scoring", leave=False) as inner:
        for _ in range(4):
            shown.facts |= {"critic": "-0.1234", "generator": "-12.5678"}
            shown.update()
        inner.update()
    text, facts = log.getvalue(), r"critic -0\.1234, generator -12\.5678"
    assert re.search(rf"^{name}: step 2 of 4, \d\d:\d\d passed, .*, {facts}$", text, re.MULTILINE), text
    assert re.search(r"^scoring:  50%", text, re.MULTILINE), text
    assert not re.search(r"[\r\x1b]|\n\n", text), text


def test_a_log_gets_nothing_of_what_is_over_in_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    log = as_log(monkeypatch, progress.LOG_SECONDS)
    for _ in bar(iterable=range(3), desc="short"):
        pass
    with TrainingBar(2, 0, "run", None, disable=False) as shown:
        shown.update(2)
    assert log.getvalue() == ""


def test_a_package_that_starts_kernels_makes_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools that start kernels import these two in a process that is no kernel itself."""
    for name in ("ipykernel", "IPython"):
        pytest.importorskip(name)
    log = as_log(monkeypatch, 0)
    with TrainingBar(2, 0, "run", None, disable=False) as shown:
        shown.update()
    assert log.getvalue().startswith("run: step 0 of 2,"), log.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["quickstart", "a-name-as-long-as-sweeps-make-it-seed-0"])
def test_a_bar_can_be_read_at_eighty_columns(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(columns, monkeypatch)
    with TrainingBar(40_000, 12_000, name, 5000, disable=False) as shown:
        shown.facts |= {"critic": "-0.0123", "generator": "-0.0456"}
        has_run_for(shown, 5000, monkeypatch)
        shown.n = 12_345
        shown.refresh()
        line = terminal.lines()[-1]
    assert len(line) <= columns
    assert line.startswith(name[:14])
    found = re.search(r"\|(.*)\| 12345/40000 \[1:23:20<\d+:\d\d:\d\d\+, 14.49s/step(.*)\]", line)
    assert found is not None, line
    assert len(found[1]) >= 8, line
    assert found[2] == (", critic -0.0123, generator -0.0456" if columns > 100 else "")


def test_messages_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80, monkeypatch)
    library = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)
    library.addHandler(handler)
    library.propagate = False
    try:
        with messages_above_bars(), TrainingBar(10, 0, "run", None, disable=False) as shown:
            shown.update()
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("look out", stacklevel=1)
            logging.getLogger("nobody.listens").warning("one")
            library.warning("two")
            shown.update()
            lines = terminal.lines()
        assert library.handlers == [handler]
    finally:
        library.removeHandler(handler)
    assert f"{Path(__file__)}:" in lines[0]
    assert "UserWarning: look out" in lines[0]
    texts = [line for line in lines if line.strip() and "warnings.warn" not in line]
    assert texts[1:3] == ["one", "two"]
    assert len(texts) == 4
    assert re.match(r"run: \d0%\|", texts[3]), lines
