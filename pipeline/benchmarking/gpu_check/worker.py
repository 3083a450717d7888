"""A process that runs checks, and the side that asks it to: a crash or a hang costs one check, not the others."""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from pipeline.benchmarking.gpu_check.table import FAILED, NOT_RUN, Check, Row

PACKAGE = Path(__file__).parents[2]
MOST_CHARACTERS = 160
"""Of a reason."""
GRACE_SECONDS = 2.0
"""For processes that were killed to be gone."""
START_SECONDS = 30.0
"""For the process, its imports and CUDA."""


class Worker:
    """One such process, until it is left. Checks share it as long as none fails by an exception."""

    def __init__(self, module: str, folder: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-m", __name__, module, str(folder), json.dumps(arguments)]
        self._log, self._started = folder / "worker.log", time.monotonic()
        with self._log.open("w") as log:
            self._process = psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def rows_of(self, check: Check, seconds: float) -> Generator[Row, None, bool]:
        """Its rows as they come; returns whether the process is fit for another one. The first check may take
        START_SECONDS longer.

        Raises:
            RuntimeError: it took longer, or the process ended.
        """
        deadline = max(time.monotonic(), self._started + START_SECONDS) + seconds
        self._process.stdin.write(f"{check.name}\n")
        self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"took longer than its {seconds:.0f} s") from None
            if not line:
                raise RuntimeError(f"its process ended with {self._process.wait()}: {_last_line(self._log)}")
            message = json.loads(line)
            if "fit" in message:
                return bool(message["fit"])
            yield Row(**message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        kill_tree(self._process)
        self._reader.join()
        self._process.stdout.close()
        with suppress(OSError):  # of what it no longer reads
            self._process.stdin.close()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def run_checks(
    module: str, checks: Sequence[Check], folder: Path, arguments: list[str], minutes: float
) -> Iterator[Row]:
    """Rows of some checks of the module's CHECKS as they come. What no longer fits into the minutes is not run; where
    they are not ten, each check's limit is as much longer or shorter.
    """
    waiting, deadline, scale = list(checks), time.monotonic() + 60 * minutes, minutes / 10
    while waiting:
        process = waiting[0].process
        with Worker(module, folder, arguments) as worker:
            while waiting and waiting[0].process == process:
                check = waiting.pop(0)
                seconds = check.seconds * scale
                if time.monotonic() + seconds > deadline:
                    yield check.without_result(NOT_RUN, "no time is left for it")
                    continue
                try:
                    if not (yield from worker.rows_of(check, seconds)):
                        break
                except (RuntimeError, OSError) as error:
                    yield check.without_result(FAILED, str(error))
                    break


def kill_tree(process: psutil.Process) -> None:
    """A launcher's ranks are in sessions of their own: each is killed by itself."""
    processes = [process]
    with suppress(psutil.Error):
        processes += process.children(recursive=True)
    for each in processes:
        with suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(processes, timeout=GRACE_SECONDS)  # they give memory of the GPU back


def reason(error: Exception) -> str:
    """In one line, with the project's own line that it came from."""
    text = (str(error).splitlines() or [""])[0][:MOST_CHARACTERS]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
    where = f" ({Path(own[-1].filename).relative_to(PACKAGE.parent)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"


def main(module: str, folder: str, arguments: list[str]) -> None:
    """Runs each check of the module's CHECKS whose name comes in, and answers with its rows."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    checks = importlib.import_module(module)
    named, context = {check.name: check for check in checks.CHECKS}, checks.Context(Path(folder), arguments)
    for line in sys.stdin:
        check, fit = named[line.strip()], True
        try:
            for row in check.run(context):
                say(asdict(row))
        except Exception as error:  # whatever it is, it costs this check alone
            traceback.print_exc()
            say(asdict(check.without_result(FAILED, reason(error))))
            fit = False
        say({"fit": fit})
        checks.free_memory()
    os._exit(0)  # nothing here is to be taken apart


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
