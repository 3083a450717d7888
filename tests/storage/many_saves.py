"""What a process holds after many checkpoints: `python -m tests.storage.many_saves --saves 10000`."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pipeline.distributed.collectives import Ranks
from pipeline.storage.checkpoint import CheckpointWriter, committed
from pipeline.storage.run_folder import RunFolder

KEPT = 3


class Held(NamedTuple):
    """By this process, while no save is under way."""

    saves: int
    mebibytes: float
    objects: int
    """Of Python, that its garbage collector knows."""
    threads: int
    descriptors: int


def held_after(saves: int, every: int, folder: Path) -> Iterator[Held]:
    """Saves a small state so many times under `folder`, and tells what is held after each `every` saves."""
    folder.joinpath("config.yaml").touch()
    run = RunFolder(folder)
    writer = CheckpointWriter(run, Ranks(), keep_last=KEPT, keep_every=None)
    process, state = psutil.Process(), {"critic.weight": torch.zeros(1000), "critic.step": torch.tensor(0)}
    for step in range(1, saves + 1):
        writer.save(state, step, {"elapsed_seconds": float(step)})
        if step % every == 0:
            writer.finish()
            time.sleep(0.1)  # for the last thread to end
            gc.collect()
            threads = len(list(Path("/proc/self/task").iterdir()))
            mebibytes = process.memory_info().rss / 2**20
            yield Held(step, mebibytes, len(gc.get_objects()), threads, process.num_fds())
    assert len(committed(run)) == KEPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=10_000)
    parser.add_argument("--folder", help="where the checkpoints go, by default the system's folder for temporary files")
    options = parser.parse_args()
    print(*Held._fields, sep="\t")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for held in held_after(options.saves, max(options.saves // 20, 1), Path(folder)):
            print(held.saves, f"{held.mebibytes:.1f}", *held[2:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
