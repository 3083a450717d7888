"""Jobs to interrupt: real launchers, real ranks, and runs that take a while."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from pipeline.storage.checkpoint import find
from tests.jobs import ROOT, TINY, environment, launch_command

STEPS = 400
LIMIT_SECONDS = 120


@contextmanager
def job(
    arguments: Sequence[str], num_processes: int, log: Path, *launcher_options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher and its ranks, all of them gone at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            launch_command(ROOT / "pipeline/train.py", arguments, num_processes, *launcher_options),
            cwd=ROOT,
            env=environment(),
            stderr=output,
            stdout=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_tree(process.pid)
            process.wait()


def ranks(launcher: int) -> list[psutil.Process]:
    children = psutil.Process(launcher).children(recursive=True)
    found = [child for child in children if any(part.endswith("train.py") for part in child.cmdline())]
    return sorted(found, key=lambda child: int(child.environ().get("RANK", 0)))


def kill_tree(pid: int) -> None:
    try:
        processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # being written
        return 0


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while last_step(run) < step:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def tiny_run(dataset: Path, root: Path, name: str, *more: str) -> list[str]:
    return [
        *TINY,
        *("--data.dataset", str(dataset), "--run.root", str(root), "--run.name", name),
        *("--training.steps", str(STEPS), "--training.n_critic", "2", "--run.checkpoint_every", "5", *more),
    ]


def assert_same_end(one: Path, other: Path) -> None:
    left, right = find(one, STEPS).tensors(), find(other, STEPS).tensors()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert last_step(one) == last_step(other) == STEPS
