"""SIGKILLs and rot at random moments, and in the end the weights of an uninterrupted run, bit for bit.

By hand, as many kills as one likes: `CHAOS_KILLS=1000 CHAOS_SEED=0 pytest -s -k by_hand` and this file print a table of
what was killed how often."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from pipeline.data import Dataset
from pipeline.storage.checkpoint import committed, newest_intact
from pipeline.storage.run_folder import RunFolder
from tests.distributed.chaos import Campaign, killable_programs
from tests.distributed.interrupting import (
    assert_ends_as_if_nothing_had_been,
    interruptible,
    job,
    kill_tree,
    last_step,
    wait_for_step,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("num_processes", "kills"), [(1, 14), (2, 10), (4, 4)])
def test_chaos(num_processes: int, kills: int, tiny_dataset: Path, tmp_path: Path) -> None:
    """28 SIGKILLs in all, at random moments, of random ranks or the whole tree; between them files rot."""
    chance = random.Random(num_processes)
    config, log = interruptible(tiny_dataset, tmp_path, "torn"), tmp_path / "log"
    torn = RunFolder(config.folder)
    for _ in range(kills):
        with job(config, num_processes, log) as process:
            # Some kills come while the ranks start or load, most while they train or save.
            if chance.random() < 0.8:
                resumed = newest_intact(torn)[0]
                resumed_step = resumed.step if resumed else 0
                target = max(resumed_step + chance.randint(1, 8), last_step(torn.path) + 1)
                wait_for_step(torn.path, target, process, log)
                time.sleep(chance.random() * 0.02)
            else:
                time.sleep(chance.random() * 0.5)
            if chance.random() < 0.5:
                chance.choice(process.ranks).kill()
                code = process.wait(timeout=60)
                assert code != 0
            else:
                kill_tree(process.pid)
        folders = committed(torn)
        if len(folders) > 1 and chance.random() < 0.5:
            rot(folders[-1], chance)
    assert_ends_as_if_nothing_had_been(config, num_processes)


def rot(checkpoint: Path, chance: random.Random) -> None:
    victim = chance.choice(sorted(checkpoint.iterdir()))
    kind = chance.choice(["flip", "truncate", "delete"])
    if kind == "flip":
        content = bytearray(victim.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
    elif kind == "truncate":
        os.truncate(victim, chance.randrange(victim.stat().st_size))
    else:
        victim.unlink()


@pytest.mark.skipif("CHAOS_KILLS" not in os.environ, reason="by hand: it takes five seconds of two cores a kill")
def test_by_hand(tiny_dataset: Path, mnist_dataset: Dataset, tmp_path: Path) -> None:
    """Trainings and programs: each ends as if nothing had been, and leaves nothing else behind."""
    kills, seed = int(os.environ["CHAOS_KILLS"]), int(os.environ.get("CHAOS_SEED", "0"))
    chance, campaign = random.Random(seed), Campaign(tiny_dataset, tmp_path, seed)
    programs = killable_programs(tiny_dataset, mnist_dataset, tmp_path)
    try:
        while (left := kills - campaign.count) > 0:
            if chance.random() < 0.4:
                campaign.train(min(left, chance.randint(3, 8)))
            else:
                campaign.program(*chance.choice(programs))
    finally:
        print("", *campaign.rows(), sep="\n")
