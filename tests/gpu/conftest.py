"""What a GPU must show: `launch/gpu_check.sh`, which fails without a CUDA device, or `pytest -m gpu tests/gpu`, which
skips all of it then.

The tests stand in the order of their value: correctness, processes, speed. With `--seconds N` a test that would not fit
into what is left of N seconds is skipped by name. `--json FILE` is written anew after each test, so that a cut at any
moment leaves what was known. Goals of speed are figures beside the tests: one that is missed fails nothing.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.goals import goals
from tests.gpu.walks import Bench
from tests.jobs import restoring_process


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--seconds", type=float, help="start no GPU test that does not fit into what is left of these")
    group.addoption("--need-gpu", action="store_true", help="fail without a CUDA device, in the place of skipping")
    group.addoption("--json", type=Path, help="file for outcomes and figures, which must not exist")
    group.addoption("--settings", default="", help="settings of the pipeline for every run, as on a command line")


class Results:
    """The outcome and the figures of each test so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.started = time.monotonic()
        self.seconds: float | None = config.getoption("seconds", None)
        self.file: Path | None = config.getoption("json", None)
        self.settings = shlex.split(config.getoption("settings", ""))
        self.rows: list[dict[str, Any]] = []
        if self.file is not None and self.file.exists():
            raise pytest.UsageError(f"--json is {self.file}: exists already, name another file")

    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def add(self, report: pytest.TestReport) -> None:
        text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "said": text[-2000:]}
        self.rows.append(row | {"figures": dict(report.user_properties)})
        if self.file is not None:
            whole = {"settings": self.settings, "seconds": time.monotonic() - self.started, "tests": self.rows}
            whole["goals"] = [goal._asdict() for goal in goals(self.rows)]
            # JSON has no NaN and no infinity: they become words.
            plain = json.loads(json.dumps(whole, default=str), parse_constant=str)
            self.file.write_text(json.dumps(plain, indent=1))


RESULTS = pytest.StashKey[Results]()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("need_gpu", False) and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"no CUDA device seen by torch {torch.__version__}: install a torch that fits the driver"
        )
    config.stash[RESULTS] = Results(config)
    config.pluginmanager.register(Reporter(config.stash[RESULTS]))


class Reporter:
    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = report.when == "call" or report.outcome != "passed"
        if ended and "tests/gpu/" in report.nodeid:
            self.results.add(report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for row in self.results.rows:
            for name, value in row["figures"].items():
                terminalreporter.write_line(f"{row['test'].rpartition('::')[2]}: {name} {value}")
        for goal in goals(self.results.rows):
            terminalreporter.write_line(f"goal, {'met' if goal.met else 'MISSED'}: {goal.what}: {goal.seen}")


@pytest.fixture(autouse=True)
def _budget(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skips without a GPU or without the time, and gives the process back its arithmetic and its memory."""
    marker = request.node.get_closest_marker("gpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (left := request.config.stash[RESULTS].left()) < marker.kwargs["seconds"]:
        pytest.skip(f"takes up to {marker.kwargs['seconds']} s, {left:.0f} are left")
    with restoring_process():
        yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Runs on noise in MNIST's form: the tests need no network."""
    return Bench(tmp_path_factory.mktemp("gpu"), request.config.stash[RESULTS].settings)
