"""Kills of many kinds at random moments, power cuts between them, and in the end what an undisturbed run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import torch

from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.storage.checkpoint import committed, newest_intact
from pipeline.storage.run_folder import RunFolder
from tests.distributed.interrupting import (
    LIMIT_SECONDS,
    TRAIN,
    Running,
    interruptible,
    job,
    kill_tree,
    last_step,
    launched,
    ranks,
    wait_for_step,
)
from tests.jobs import ROOT, changed, final_state, flags, launch, tiny_config
from tests.ranks import Job

STEPS = 60
WORLDS = (1, 1, 2, 2, 2, 4, 4, 8)
CGROUP = Path("/sys/fs/cgroup/memory")
MEMORY_LIMIT = 20 * 2**20
"""Of what a forked rank takes in addition to its parent's memory."""

# -- kills of a training -----------------------------------------------------------------------------------------------


class Kills:
    """Each kills something of a running job; the job is gone when it returns. A method's name is a kind."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def rank(self, running: Running) -> None:
        self._chance.choice(ranks(running)).kill()
        running.wait(LIMIT_SECONDS)

    def tree(self, running: Running) -> None:
        kill_tree(running.pid)

    def launcher(self, running: Running) -> None:
        """The ranks hear of it, save and end."""
        orphans = ranks(running)
        psutil.Process(running.pid).kill()
        running.wait(LIMIT_SECONDS)
        _, alive = psutil.wait_procs(orphans, LIMIT_SECONDS)
        assert not alive, "ranks that outlive their launcher"

    def signal(self, running: Running) -> None:
        """One that asks to stop, to any rank."""
        number = self._chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        self._chance.choice(ranks(running)).send_signal(number)
        running.wait(LIMIT_SECONDS)

    def suspended(self, running: Running) -> None:
        """A rank that stands still until the others have given up, or for a moment where there are none."""
        everyone = ranks(running)
        victim = self._chance.choice(everyone)
        victim.suspend()
        if len(everyone) == 1:
            time.sleep(self._chance.random())
            victim.resume()
            time.sleep(self._chance.random() * 0.1)
        else:
            psutil.wait_procs([rank for rank in everyone if rank != victim], LIMIT_SECONDS)
        kill_tree(running.pid)

    def memory(self, running: Running) -> None:
        """The kernel's own kill of a rank in a control group without memory to spare."""
        victim = self._chance.choice(ranks(running))
        group = CGROUP / f"gan-{victim.pid}"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(MEMORY_LIMIT // 100))
            (group / "cgroup.procs").write_text(str(victim.pid))
            with contextlib.suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
                victim.wait(5)
        finally:
            kill_tree(running.pid)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.05)

    @cached_property
    def kinds(self) -> list[str]:
        kinds = ["rank", "tree", "launcher", "signal", "suspended"]
        return [*kinds, "memory"] if os.access(CGROUP, os.W_OK) and os.geteuid() == 0 else kinds


# -- what a power cut leaves -------------------------------------------------------------------------------------------


def damage(path: Path, chance: random.Random) -> str:
    """Does to a file what a file system does to one that was not fsynced."""
    content, kind = path.read_bytes(), chance.choice(["cut", "zeroed", "other bytes", "flipped bit", "missing"])
    at = chance.randrange(len(content)) if content else 0
    match kind:
        case "cut":
            path.write_bytes(content[:at])
        case "zeroed":
            path.write_bytes(content[:at] + bytes(len(content) - at))
        case "other bytes":
            path.write_bytes(content[:at] + chance.randbytes(len(content) - at))
        case "flipped bit" if content:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
        case "missing":
            path.unlink()
    return kind


def power_cut(run: RunFolder, chance: random.Random) -> str:
    """Never of the only checkpoint: one that was committed stays, but for a disk that rots."""
    folders = committed(run)
    match chance.randrange(5):
        case 0 if len(folders) > 1:
            return f"checkpoint {damage(chance.choice(sorted(folders[-1].iterdir())), chance)}"
        case 1 if folders:  # a save that had not come to its end
            half = folders[-1].with_name("step-00009999.tmp")
            shutil.copytree(folders[-1], half, dirs_exist_ok=True)
            damage(chance.choice(sorted(half.iterdir())), chance)
            return "half a checkpoint"
        case 2 if run.metrics.exists():
            torn = chance.choice([b'{"step": 3, "crit', bytes(300), chance.randbytes(100), b"\xff\xfe\n"])
            with run.metrics.open("ab") as file:
                file.write(torn)
            return "torn metrics"
        case 3 if run.config.exists():
            dead = f".{run.config.name}.{os.uname().nodename}.{2**22 + chance.randrange(100)}.tmp"
            run.path.joinpath(dead).write_bytes(chance.randbytes(50))
            return "half a replacement"
        case 4 if run.path.is_dir():
            owner = {"host": os.uname().nodename, "pid": 2**22 + 5, "started": 1.0}
            run.lock.write_text(json.dumps(owner))
            return "a dead lock"
    return "nothing"


# -- programs to kill --------------------------------------------------------------------------------------------------

Killable = tuple[str, str | Path, list[str], Callable[[], object]]
"""Name, program, arguments, and what tells what it left and takes it away."""


def killable_programs(tiny_dataset: Path, mnist: Dataset, root: Path) -> list[Killable]:
    data, run = root / "data", RunFolder(root / "finished")
    config = tiny_config(run={"root": str(root), "name": "finished"}, training={"steps": 2, "n_critic": 1})
    config = changed(config, data={"root": str(mnist.folder.parent)}, evaluation={"num_images": 300})
    assert launch(TRAIN, flags(config)).returncode == 0
    shutil.copytree(tiny_dataset, data / "tiny")
    np.savez(root / "in.npz", images=np.random.default_rng(0).integers(0, 256, (20_000, 12, 12), dtype=np.uint8))

    def taken(*paths: Path) -> Callable[[], object]:
        def take() -> object:
            found = dict[str, str]()
            for path in paths:
                files = sorted(path.rglob("*")) if path.is_dir() else [path]
                found |= {str(file): sha256(file.read_bytes()).hexdigest() for file in files}
                assert not [each for each in path.parent.iterdir() if each.suffix == ".tmp"], "left over"
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return found

        return take

    def scores() -> object:
        found = json.loads(run.scores(2).read_text())
        assert not list(run.evaluation.glob(".*")), "left over"
        shutil.rmtree(run.evaluation)
        return found

    def report() -> object:
        found = sorted(path.name for path in run.path.glob("*"))
        for kind in ("html", "md", "json"):
            run.report(kind).unlink()
        return found

    exported, classifier = root / "out.safetensors", data / "tiny/classifier.safetensors"
    prepare = ["npz", str(root / "in.npz"), "--name", "again", "--root", str(data)]
    train_classifier = ["--dataset", str(data / "tiny"), "--epochs", "3", "--device", "cpu"]
    return [
        ("prepare", ROOT / "pipeline/prepare.py", prepare, taken(data / "again")),
        ("evaluate", ROOT / "pipeline/evaluate.py", [str(run.path)], scores),
        ("report", ROOT / "pipeline/report.py", [str(run.path)], report),
        ("export", "pipeline.export", [str(run.path), str(exported)], taken(exported)),
        ("train_classifier", "pipeline.evaluation.train_classifier", train_classifier, taken(classifier)),
    ]


def left_behind(folder: Path) -> Counter[str]:
    """The files of a run but for shards, whose number depends on the ranks'; checkpoints by their number alone, as one
    that a stop saved takes the place of an older one."""
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("shard-")]
    return Counter(re.sub(r"^checkpoints/step-\d{8}", "checkpoint", file) for file in files)


# -- campaigns ---------------------------------------------------------------------------------------------------------


class Campaign:
    """Kills runs, and lets each end as it would have."""

    def __init__(self, dataset: Path, root: Path, seed: int) -> None:
        self._dataset, self._root, self._chance = dataset, root, random.Random(f"campaign {seed}")
        self._log, self._references = root / "log", dict[object, Path]()
        self.table: Counter[tuple[str, str]] = Counter()
        """(kind, outcome) -> how often."""

    @property
    def count(self) -> int:
        return sum(number for (kind, _), number in self.table.items() if not kind.startswith("power cut"))

    def train(self, kills: int) -> None:
        """A run that is killed so many times, at one number of ranks in float32 or at changing ones in float64."""
        chance = self._chance
        elastic = chance.random() < 0.25
        world = chance.choice(WORLDS)
        name = f"torn-{self.count}"
        config = self._config(name, elastic)
        run, of = RunFolder(config.folder), Kills(chance)
        for _ in range(kills):
            world = chance.choice(WORLDS) if elastic else world
            kind = chance.choice(of.kinds)
            before = newest_intact(run)[0]
            with self._running(config, world, kind) as running:
                target = max(before.step if before else 0, last_step(run.path)) + chance.randint(1, 12)
                if target < STEPS and chance.random() < 0.8:
                    wait_for_step(run.path, target, running, self._log)
                    time.sleep(chance.random() * 0.05)
                else:
                    time.sleep(chance.random() * 2)
                ended = running.poll()
                if ended is None:
                    with contextlib.suppress(psutil.NoSuchProcess, ValueError, IndexError):
                        getattr(of, kind)(running)
                else:
                    assert ended == 0, self._log.read_text()[-3000:]
            label = f"{kind}, {'W changes' if elastic else f'W = {world}'}"
            self.table[label, "had ended before" if ended is not None else "killed"] += 1
            if chance.random() < 0.5:
                self.table[f"power cut: {power_cut(run, chance)}", "left behind"] += 1
        result = launch(TRAIN, flags(config), world)
        assert result.returncode == 0, result.stderr[-3000:]
        self._compare(config, world, elastic)

    def program(self, name: str, program: str | Path, arguments: list[str], output: Callable[[], object]) -> None:
        """A program that is killed at a random moment, and then run: what it leaves, `output`, is what the undisturbed
        one left. `output` takes away what it returns."""
        if name not in self._references:
            started = time.monotonic()
            result = launch(program, arguments)
            assert result.returncode == 0, result.stderr[-3000:]
            self._outputs[name] = output(), time.monotonic() - started
            self._references[name] = self._root
        expected, seconds = self._outputs[name]
        with Job(program, arguments, 1, stdout=self._log, stderr=self._log) as running:
            time.sleep(self._chance.random() * seconds)
            ended = running.poll()
            number = self._chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            with contextlib.suppress(psutil.NoSuchProcess):
                running.ranks[0].send_signal(number)
            running.wait(LIMIT_SECONDS)
        self.table[f"{name}, {number.name}", "had ended before" if ended is not None else "killed"] += 1
        result = launch(program, arguments)
        assert result.returncode in (0, 2), result.stderr[-3000:]
        assert result.returncode == 0 or "already" in result.stderr, result.stderr[-3000:]
        assert output() == expected, name

    @cached_property
    def _outputs(self) -> dict[str, tuple[object, float]]:
        return {}

    def _config(self, name: str, elastic: bool) -> Config:
        config = interruptible(self._dataset, self._root, name, STEPS)
        return changed(config, runtime={"precision": "float64" if elastic else "float32", "timeout_seconds": 20})

    @contextmanager
    def _running(self, config: Config, world: int, kind: str) -> Iterator[Running]:
        start = launched if kind == "launcher" else job
        with start(config, world, self._log) as running:
            if kind == "launcher":  # its ranks come seconds later
                deadline = time.monotonic() + LIMIT_SECONDS
                while len(ranks(running)) < world and running.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
            yield running

    def _compare(self, config: Config, world: int, elastic: bool) -> None:
        key = "float64" if elastic else world
        if key not in self._references:
            reference = self._config(f"whole-{key}", elastic)
            result = launch(TRAIN, flags(reference), 1 if elastic else world)
            assert result.returncode == 0, result.stderr[-3000:]
            self._references[key] = reference.folder
        left, right = (final_state(folder, STEPS) for folder in (config.folder, self._references[key]))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            if elastic:
                torch.testing.assert_close(tensor, right[name], rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(tensor, right[name]), name
        lines = RunFolder(config.folder).metrics.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
        kept, expected = map(left_behind, (config.folder, self._references[key]))
        assert kept == expected, f"left over: {kept - expected}, missing: {expected - kept}"
        shutil.rmtree(config.folder)

    def rows(self) -> list[str]:
        """The table: kind, outcome, how often."""
        width = max(len(kind) for kind, _ in self.table)
        return [f"{kind:<{width}}  {outcome:<16}  {count}" for (kind, outcome), count in sorted(self.table.items())]
