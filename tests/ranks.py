"""Ranks in a twentieth of the time: forked from a server that has imported torch and the pipeline once.

A test process that asks for its first job starts the server, `python -u -m tests.ranks`, a process of one thread that
imports all of pipeline/ and LIBRARIES and then waits. For each job it forks a launcher, which forks the ranks, waits
for them and ends the others when one fails, as `accelerate launch` does. A rank is a process like any other: it has the
environment variables, the working directory, the output and the argv of a launched one, runs the script as `__main__`,
and can be killed, suspended or sent signals by its process id.

What such a job does not show, and tests of the real launcher must: what the launcher itself does, what importing costs
or warns of, ranks with different hash seeds, and the end of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import psutil

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.utils.tensorboard", "torchvision.utils", "webdataset"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2", "h5py"),
)
"""What the pipeline imports where it is needed; a name that is missing here costs time and nothing else."""
GRACE_SECONDS = 10
"""Between SIGTERM and SIGKILL to the ranks that are left when one has failed; the launcher gives them 30."""
WATCH_SECONDS = 1.0
"""Between two looks whether the process that asked is still there."""
PORTS = range(10_000, 32_000)
"""Below the ports that the system gives to whoever asks for any."""


# -- asking for jobs ---------------------------------------------------------------------------------------------------


class Job:
    """A launcher and its ranks, with the interface of a Popen as far as tests use it."""

    def __init__(
        self,
        program: str | Path,
        arguments: Sequence[str],
        num_processes: int,
        *,
        stdout: Path,
        stderr: Path,
        folder: Path = ROOT,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it.

        Args:
            program: a script's path, or a module's name for what `python -m` would run.
            stdout, stderr: files to append to; they may be the same.
            variables: added to this process's environment.
        """
        request = {
            "program": str(program),
            "arguments": list(arguments),
            "num_processes": num_processes,
            "stdout": str(stdout),
            "stderr": str(stderr),
            "folder": str(folder),
            "environment": os.environ | {"OMP_NUM_THREADS": "1"} | dict(variables or {}),
        }
        self._connection, theirs = socket.socketpair()
        self._answers = self._connection.makefile("r")
        try:
            with theirs:
                socket.send_fds(_server(), [b"+"], [theirs.fileno()])
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            started = json.loads(self._answers.readline())
        except (OSError, ValueError):
            self._close()
            raise RuntimeError("the server of ranks has died: its standard error says why") from None
        self.pid: int = started["launcher"]
        self.ranks = [psutil.Process(pid) for pid in started["ranks"]]
        """In the order of their ranks."""
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """0, or the exit code of the rank that failed first: -N if signal N ended it.

        Raises:
            subprocess.TimeoutExpired: it is still running after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("ranks", timeout or 0)
            answer = self._answers.readline()
            self.returncode = json.loads(answer)["code"] if answer else -signal.SIGKILL  # the launcher was killed
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self) -> None:
        """SIGTERM to every rank, as the launcher hands it on."""
        for rank in self.ranks:
            if rank.is_running():
                rank.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Whatever is left of it is killed, and gone when this returns."""
        self._connection.shutdown(socket.SHUT_WR)
        self.wait()
        self._close()

    def _close(self) -> None:
        self._answers.close()
        self._connection.close()


@functools.cache
def _server() -> socket.socket:
    """The control connection to this process's server, which ends when it is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.ranks"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
            start_new_session=True,  # a terminal's Ctrl-C is for pytest
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# -- the server --------------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Forks a launcher for each connection that comes through `control`, until that is closed."""
    modules = [module.name for module in pkgutil.walk_packages([str(ROOT / "pipeline")], "pipeline.")]
    for name in (*LIBRARIES, *(module for module in modules if not module.endswith("__main__"))):
        with contextlib.suppress(ImportError):  # whoever runs it will hear of it
            importlib.import_module(name)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a fork copies the calling thread alone, and the locks that others hold stay locked"
    gc.collect()
    gc.freeze()  # or every rank would look through what all inherit, and copy its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for a launcher
    parent = os.getppid()
    while os.getppid() == parent:
        if not select.select([control], [], [], WATCH_SECONDS)[0]:
            continue
        asked, descriptors, *_ = socket.recv_fds(control, 1, 1)
        if not asked:
            return
        if os.fork() == 0:
            control.close()
            with socket.socket(fileno=descriptors[0]) as connection:
                launch(connection)
            os._exit(0)
        os.close(descriptors[0])


def launch(connection: socket.socket) -> None:
    """Forks the ranks of one job and sees them through to the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile("r") as lines:
        request = json.loads(lines.readline())
    count, port, pids = request["num_processes"], free_port(), []
    for rank in range(count):
        place = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        pids.append(os.fork())
        if pids[-1] == 0:
            connection.close()
            run(request, place if count > 1 else {})
    send(connection, {"launcher": os.getpid(), "ranks": pids})
    send(connection, {"code": wait_for(pids, connection)})


def send(connection: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        connection.sendall(json.dumps(answer).encode() + b"\n")


def wait_for(pids: list[int], connection: socket.socket) -> int:
    """The exit code of the rank that failed first, or 0. All are gone when it returns."""
    running = {os.pidfd_open(pid): pid for pid in pids}
    asked_for = [connection.fileno()]
    code, deadline, parent = 0, float("inf"), os.getppid()

    def end_all(number: signal.Signals) -> None:
        for descriptor in running:
            signal.pidfd_send_signal(descriptor, number)

    while running:
        ready = select.select([*asked_for, *running], [], [], WATCH_SECONDS)[0]
        if connection.fileno() in ready or time.monotonic() > deadline or os.getppid() != parent:
            end_all(signal.SIGKILL)
            asked_for = []
        for descriptor in running.keys() & set(ready):
            ended = os.waitstatus_to_exitcode(os.waitpid(running.pop(descriptor), 0)[1])
            os.close(descriptor)
            if ended and not code:
                code, deadline = ended, time.monotonic() + GRACE_SECONDS
                end_all(signal.SIGTERM)
    return code


def free_port() -> int:
    while True:
        with socket.socket() as opened:
            try:
                port = random.SystemRandom().choice(PORTS)
                opened.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run(request: dict[str, Any], place: dict[str, str]) -> NoReturn:
    """Becomes a rank: what a new process has of its own, then the program."""
    os.environ.clear()
    os.environ.update(request["environment"] | place)
    os.chdir(request["folder"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    random.seed()
    sys.modules["numpy"].random.seed()
    program, is_script = request["program"], request["program"].endswith(".py")
    sys.argv = [program, *request["arguments"]]
    sys.path[0] = str(Path(program).parent) if is_script else request["folder"]
    code = 0
    try:
        if is_script:
            runpy.run_path(program, run_name="__main__")
        else:
            sys.modules.pop(program, None)  # or runpy would warn of two copies
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # What the interpreter does at its end, but for taking itself apart.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=0))
