"""What only Linux has is not needed: a program trains, evaluates and reports where it does not exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import to_yaml
from tests.jobs import ROOT, tiny_config

WITHOUT_LINUX = '''
"""Python imports this at its start. It hides what other systems than Linux do not have."""
import ctypes, errno, os, sys

for name in ("sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "pidfd_open"):
    delattr(os, name)

def refuse(path, caller):
    # psutil reads /proc because it was built for Linux.
    if str(path).startswith(("/proc", "/dev/shm")) and not caller.f_globals["__name__"].startswith("psutil"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

def stat(path, *arguments, original=os.stat, **options):
    refuse(path, sys._getframe(1))
    return original(path, *arguments, **options)

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        refuse(arguments[0], sys._getframe(1))

class CDLL(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        if name == "libc.so.6" and sys._getframe(1).f_globals["__name__"].startswith("pipeline"):  # not torch's use
            raise OSError(f"{name}: not found")
        super().__init__(name, *arguments, **options)

    def __getattr__(self, name):
        if name in ("prctl", "GOMP_parallel", "omp_pause_resource_all"):
            raise AttributeError(name)
        return super().__getattr__(name)

os.stat, ctypes.CDLL = stat, CDLL
sys.addaudithook(hook)
'''
PROGRAM = """
import ctypes, os, sys
from pathlib import Path

for path in ("/proc/self/status", "/dev/shm"):
    assert not Path(path).exists(), path
assert not hasattr(os, "fork") and not hasattr(ctypes.CDLL(None), "prctl")

from pipeline import configure, evaluate, train
from pipeline.reporting.page import write_report

config = configure(sys.argv[1])
assert train(config).step == 2
assert train(configure(sys.argv[1], {"run.name": "streaming", "data.source": "streaming"})).step == 2
[scores] = evaluate(config.folder)
assert write_report(config.folder).exists()
print(scores["features"]["torch.nn:Flatten"]["fid"])
"""


@pytest.mark.slow
def test_a_run_needs_nothing_that_only_linux_has(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LINUX)
    config = tiny_config(
        run={"root": str(tmp_path / "runs"), "name": "resident"},
        data={"dataset": str(tiny_dataset), "workers": 0},
        training={"steps": 2},
        evaluation={"every": 2, "num_images": 60, "features": ["torch.nn:Flatten"]},
        runtime={"device": "cpu", "threads": 2},
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    trained = json.loads((tmp_path / "runs/resident/evaluation/step-00000002.json").read_text())
    assert float(result.stdout) == trained["features"]["torch.nn:Flatten"]["fid"]
