"""What a launcher tells its processes, and what they tell it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT, environment, flags, launch, tiny_config


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "many"}, "the environment variable WORLD_SIZE is 'many', no number"),
        ({"RANK": "-1"}, "the environment variable RANK is '-1', no number"),
        ({"RANK": "1"}, "the environment variable RANK is 1, but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "0"}, "the environment variable RANK is 0, but WORLD_SIZE is 0"),
        ({"LOCAL_RANK": "3"}, "the environment variable LOCAL_RANK is 3, but LOCAL_WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set: start with a launcher"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "[rank 1] error: WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"},
            "[rank 1] error: the environment variable MASTER_PORT is 65536, no port",
        ),
    ],
)
def test_what_no_launcher_says_is_one_line(variables: dict[str, str], line: str) -> None:
    config = tiny_config(runtime={"timeout_seconds": 1})
    result = launch(ROOT / "pipeline/train.py", flags(config), variables=variables)
    assert result.returncode == 2
    assert line in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_rank_that_has_saved_ends_whatever_the_launcher_sends_it(tmp_path: Path) -> None:
    """When another one was faster. Its own last act is to remove the stop file, or no job is queued again."""
    stop = tmp_path / "stop"
    stop.touch()
    program = """
import atexit, os, signal
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import restoring_process
from pipeline.distributed.stopping import StopRequest
from pipeline.errors import Preempted

def main():
    with restoring_process():
        StopRequest()
        raise Preempted("stopped")

class Reports:
    def __str__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return "stopped"

def interrupted():
    try:
        main()
    except Preempted as stop:
        raise Preempted(Reports()) from stop

atexit.register(os.kill, os.getpid(), signal.SIGTERM)
run_program(interrupted)
"""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "PIPELINE_STOP_FILE": str(stop)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment() | variables, capture_output=True, text=True, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (75, "stopped\n")
    assert not stop.exists()


def test_the_launchers_page_about_a_failed_rank_ends_with_what_the_rank_said(tmp_path: Path) -> None:
    """In the form that torchrun's agent reads."""
    told = tmp_path / "error.json"
    config = tiny_config(training={"clip_value": None})
    result = launch(ROOT / "pipeline/train.py", flags(config), variables={"TORCHELASTIC_ERROR_FILE": str(told)})
    message = json.loads(told.read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == result.stderr.splitlines()[-1]
    assert message["message"].startswith("error: training.clip_value is null")


INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
except KeyboardInterrupt:
    raise ImportError("half a module") from None
"""


@pytest.mark.parametrize(
    ("program", "code"),
    [(["pipeline/prepare.py", "mnist"], -2), (["pipeline/train.py"], 130)],
    ids=["before", "in main"],
)
def test_an_interrupt_while_packages_are_imported_is_no_traceback(
    program: list[str], code: int, tmp_path: Path
) -> None:
    """The first that is imported of torch sends it; packages make another error of it."""
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = ["env", "--default-signal=INT", sys.executable, *program]  # the tests may run where it is ignored
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, "")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("run_program(lambda: interrupt() or 0)", (130, "stopped by an interrupt\n")),
        ("atexit.register(interrupt); run_program(lambda: 0)", (-2, "")),
    ],
    ids=["in main", "at the interpreter's end"],
)
def test_an_interrupt_is_no_traceback(program: str, outcome: tuple[int, str]) -> None:
    code = "import atexit, os, signal, time; from pipeline.distributed.launcher import run_program\n"
    code += f"def interrupt(): os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n{program}"
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]  # the tests may run where it is ignored
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == outcome


def test_the_launcher_is_known_by_the_command_of_the_parent_process(tmp_path: Path) -> None:
    """Not by the names of folders on the way to it."""
    parent = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[-1]], check=True)"
    child = "from pipeline.distributed.launcher import launch_arguments\nprint((launch_arguments() or [None])[:-1])"
    folder = tmp_path / "accelerate launch"
    folder.mkdir()
    for name, arguments, expected in [
        ("accelerate", ["launch", "--num_processes", "2"], "['--num_processes', '2']"),
        ("accelerate", ["launch", "-m", "launch"], "['-m', 'launch']"),
        ("accelerate-launch", ["--multi_gpu"], "['--multi_gpu']"),
        ("accelerate", ["test"], "[]"),
        ("other", ["--multi_gpu"], "[]"),
    ]:
        (folder / name).write_text(parent)
        command = [sys.executable, str(folder / name), *arguments, child]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == expected, name
