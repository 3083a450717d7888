"""No power cut loses a committed checkpoint, shows a wrong one, leaves a replaced file neither old nor new, or keeps
the run from going on.

POWER_CUTS sets how many outcomes of a cut are tried at each point of a run (4): by hand `POWER_CUTS=64 pytest -s` and
this file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import pytest

from pipeline.checks.settings import Plan, check_run_folder
from pipeline.config import Config
from pipeline.storage.checkpoint import newest_intact, sha256_of_tensor, sweep
from pipeline.storage.lock import lock_run
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, changed, flags, launch, tiny_config
from tests.storage.power_cuts import Disk, calls, read, write

OUTCOMES = int(os.environ.get("POWER_CUTS", "4"))


class Recorded:
    """A run under a record, to cut short everywhere."""

    def __init__(self, config: Config, log: Path, ranks: int) -> None:
        self._config, root = config, Path(config.run.root).parent
        self._before, self._disk = read(root), Disk(root)
        result = launch(ROOT / "tests/storage/recorded_run.py", [str(log), *flags(config)], ranks)
        if "strace could not attach" in result.stderr or "strace: No such file" in result.stderr:
            pytest.skip("takes strace, and the right to look at a process's system calls")
        assert result.returncode == 0, result.stderr[-3000:]
        self._log, self._after = log, read(root)
        self._saved = {int(step): found for step, found in json.loads(log.with_suffix(".json").read_text()).items()}

    def cut(self, place: Path, *, intact: int = 0, damaged: int | None = None) -> int:
        """Checks what cuts at each point of the run leave, in `place`; returns how many differ.

        Args:
            intact, damaged: the newest steps that the run found, if any.
        """
        chance, seen, settings = random.Random(0), set[str](), set[str]()
        disk, name = self._disk, self._config.run.name
        for call in calls(self._log):
            if not disk.take(call):
                continue
            promised = max([intact, *map(int, disk.promises)])
            allowed = {path: {self._before.get(path), *contents} for path, contents in disk.replaced.items()}
            for tree in disk.cuts(OUTCOMES, chance):
                key = digest((promised, sorted(tree.items())))
                if key in seen:
                    continue
                seen.add(key)
                write(tree, place)
                for path, contents in allowed.items():
                    if Path(path).name != "metrics.jsonl":  # which also grows
                        assert tree.get(path) in contents, f"{path} is neither the old file nor the new one"
                run = RunFolder(place / "runs" / name)
                if run.path.is_dir():
                    # To read the settings takes longer than all the rest.
                    files = [tree.get(f"runs/{name}/{path.name}") for path in (run.config, run.environment)]
                    kinds = digest((files, sorted(path.name for path in run.path.iterdir())))
                    if kinds not in settings:
                        settings.add(kinds)
                        check_run_folder(Plan(changed(self._config, run={"root": str(run.path.parent)}), 1))
                    self._go_on(run, promised, may_be_damaged=damaged is not None and str(damaged) not in disk.promises)
                else:
                    assert not promised, "the run is gone"
        assert disk.now() == self._after, "the record tells all that was done"
        return len(seen)

    def _go_on(self, run: RunFolder, promised: int, *, may_be_damaged: bool) -> None:
        """As the trainer does."""
        lock_run(run).release()
        sweep(run)
        newest, lines = newest_intact(run)
        step = newest.step if newest else 0
        assert step >= promised, f"step {promised} was committed: {lines}"
        assert not lines or may_be_damaged, lines
        if newest is not None and newest.step in self._saved:
            tensors = {name: sha256_of_tensor(tensor) for name, tensor in newest.tensors().items()}
            assert tensors == self._saved[newest.step]
        assert not list(run.checkpoints.glob("*.tmp"))
        run.trim_metrics(step)
        lines = run.metrics.read_text().splitlines() if run.metrics.exists() else []
        logged = [json.loads(line)["step"] for line in lines]
        assert logged == list(range(1, len(logged) + 1))
        assert len(logged) >= step - 1, "the line of a step comes right after its save"


def digest(content: object) -> str:
    return sha256(repr(content).encode()).hexdigest()


@contextmanager
def no_waiting() -> Iterator[None]:
    """The readers under test wait for no disk."""
    with patch("os.fsync"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2] if "POWER_CUTS" in os.environ else [1])
def test_what_a_power_cut_leaves_goes_on(ranks: int, tiny_dataset: Path, tmp_path: Path) -> None:
    """A run of six steps, and the same command after the newest checkpoint has rotted."""
    (tmp_path / "disk").mkdir()
    place = {"root": str(tmp_path / "disk/runs"), "name": "cut"}
    settings = {"checkpoint_every": 2, "keep_last": 2, "sample_every": 3}
    config = tiny_config(
        run=place | settings, data={"dataset": str(tiny_dataset)}, training={"steps": 6, "n_critic": 1}
    )
    first = Recorded(config, tmp_path / "first", ranks)
    with no_waiting():
        count = first.cut(tmp_path / "left")
    run = RunFolder(config.folder)
    rotten = next(run.checkpoint(6).glob("*.safetensors"))
    rotten.write_bytes(rotten.read_bytes()[:-1] + b"?")
    second = Recorded(changed(config, training={"steps": 7}, run={"checkpoint_every": 6}), tmp_path / "second", ranks)
    with no_waiting():
        count += second.cut(tmp_path / "left", intact=4, damaged=6)
    assert count > 100
    print(f"{count} different cuts with {ranks} rank(s)")
