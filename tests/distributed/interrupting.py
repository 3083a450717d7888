"""Jobs to interrupt, and runs that take a while."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

import psutil
import torch

from pipeline.config import Config
from pipeline.storage.checkpoint import newest_intact
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, changed, environment, final_state, flags, launch, launch_command, tiny_config
from tests.ranks import Job

TRAIN = ROOT / "pipeline/train.py"
ENDLESS = 100_000
"""Steps: no machine is through before it is interrupted."""
LIMIT_SECONDS = 120

Running = Job | subprocess.Popen[bytes]


@contextmanager
def job(config: Config, num_processes: int, log: Path) -> Iterator[Job]:
    """Forked ranks that train, all of them gone at the end."""
    with Job(TRAIN, flags(config), num_processes, stdout=log, stderr=log) as running:
        yield running


@contextmanager
def launched(
    config: Config, num_processes: int, log: Path, *launcher_options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher and the ranks that it started to train, all of them gone at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            launch_command(TRAIN, flags(config), num_processes, *launcher_options),
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


def ranks(running: Running) -> list[psutil.Process]:
    """In the order of their ranks; those of a launcher as soon as they are there."""
    if isinstance(running, Job):
        return running.ranks
    found = []
    for child in psutil.Process(running.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # or a zombie, which is one of them
            if any(part.endswith("train.py") for part in child.cmdline()):
                found.append((int(child.environ().get("RANK", 0)), child))
    return [child for _, child in sorted(found, key=itemgetter(0))]


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
    path = RunFolder(run).metrics
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # being written, or torn
        return 0


def wait_for_step(run: Path, step: int, running: Running, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while last_step(run) < step:
        assert running.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def interruptible(dataset: Path, root: Path, name: str, steps: int = ENDLESS) -> Config:
    """A run of short steps with a checkpoint every five."""
    return tiny_config(
        run={"name": name, "root": str(root), "checkpoint_every": 5},
        data={"dataset": str(dataset)},
        training={"steps": steps, "n_critic": 1},
    )


def assert_ends_as_if_nothing_had_been(config: Config, num_processes: int) -> None:
    """A run that was interrupted goes on for five steps, and a new one takes all these steps at once: equal bits."""
    interrupted, whole = config.folder, config.folder.with_name(f"{config.run.name}-whole")
    newest, _ = newest_intact(RunFolder(interrupted))
    steps = newest.step + 5 if newest else 5
    for folder in (interrupted, whole):
        again = changed(config, run={"name": folder.name}, training={"steps": steps})
        result = launch(TRAIN, flags(again), num_processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("going on from" in result.stderr) == (newest is not None and folder == interrupted)
    assert_same_end(whole, interrupted, steps)


def assert_same_end(one: Path, other: Path, steps: int) -> None:
    left, right = final_state(one, steps), final_state(other, steps)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for run in (one, other):
        lines = RunFolder(run).metrics.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
