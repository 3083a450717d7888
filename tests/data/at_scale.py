"""What the pipeline takes for a large dataset: `python -m tests.data.at_scale --images 1000000 --folder /tmp`.

Makes a dataset of images of 64 x 64 x 3 (12.3 kB each: 1,000,000 take 12.3 GB of disk), prepares it, trains, goes on in
the middle of an epoch, evaluates, and prints how long each took, the most memory that each process held, the share of
time that training waited for data, and how soon the first step after the resume was done. The folder is deleted at the
end. Not a test: it asserts nothing and takes minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.shards import Images, Labels, write_shard
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, environment, launch_command

SIDE, IMAGES_PER_BLOCK, IMAGES_PER_SHARD = 64, 250, 2500
SAMPLE_SECONDS = 0.1


class Pooled(nn.Module):
    """A feature space that costs next to nothing: means of 16 x 16 pixels, 48 numbers an image."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float() / 255, SIDE // 4).flatten(1)


def parse() -> Namespace:
    parser = ArgumentParser(prog="at_scale", description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="half of them before the resume, half after")
    parser.add_argument("--width", type=float, default=0.1, help="of the networks")
    return parser.parse_args()


def blocks(seed: int, count: int) -> Iterator[tuple[Images, Labels]]:
    """Squares of 8 pixels in any colour, and any of ten classes."""
    random = np.random.default_rng(seed)
    for start in range(0, count, IMAGES_PER_BLOCK):
        size = min(IMAGES_PER_BLOCK, count - start)
        squares = random.integers(0, 256, (size, 3, SIDE // 8, SIDE // 8), dtype=np.uint8)
        yield squares.repeat(8, axis=2).repeat(8, axis=3), random.integers(0, 10, size)


def make(folder: Path, split: str, num_images: int) -> None:
    for index, start in enumerate(range(0, num_images, IMAGES_PER_SHARD)):
        count = min(IMAGES_PER_SHARD, num_images - start)
        write_shard(folder / f"{split}-{index:05d}.tar", blocks(index + 10**6 * (split == "test"), count))


class Watched:
    """A program run to its end: its seconds, the most memory of each process, and when each line of its errors came."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._peaks: dict[int, tuple[str, int]] = {}
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | {"PYTHONPATH": str(ROOT)},  # an installed package may be named tests too
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            reader = threading.Thread(target=self._read, args=(process.stderr,))
            reader.start()
            while process.poll() is None:
                self._sample(psutil.Process(process.pid))
                time.sleep(SAMPLE_SECONDS)
            reader.join()
        self.seconds = time.monotonic() - self.started
        if process.returncode:
            sys.exit(f"{name} failed: {' / '.join(line for _, line in self.lines[-5:])}")
        print(f"{name}: {self.seconds:.1f} s")
        for role, kilobytes in self._peaks.values():
            print(f"  {role}: at most {kilobytes / 1024:,.0f} MiB")

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append((time.monotonic() - self.started, line.rstrip()))

    def _sample(self, root: psutil.Process) -> None:
        try:
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
                if peak is not None:  # else it is a zombie
                    before = self._peaks.get(process.pid)
                    role = before[0] if before else f"{role_of(process)} (process {len(self._peaks) + 1})"
                    self._peaks[process.pid] = role, int(peak.split()[1])
            except (OSError, psutil.Error):
                continue


def role_of(process: psutil.Process) -> str:
    """The script that a process runs; whether it launches that, or reads data for it."""
    arguments = process.cmdline()
    if "pipeline.data.streaming" in "".join(arguments[2:3]):
        return "data worker"
    script = next((Path(text).name for text in arguments[1:] if text.endswith(".py")), " ".join(arguments[1:3]))
    return f"launcher of {script}" if "accelerate.commands.launch" in arguments else script


def train(given: Namespace, dataset: Path, runs: Path, steps: int) -> Watched:
    settings = {
        "data.dataset": dataset,
        "data.source": "streaming",
        "data.workers": given.workers,
        "data.lanes": 8,
        "network.width": given.width,
        "training.steps": steps,
        "training.n_critic": 1,
        "evaluation.every": "null",
        "run.root": runs,
        "run.name": "large",
        "run.trackers": "[]",
        "run.log_every": 1,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    return Watched(f"training to step {steps}", launch_command(ROOT / "pipeline/train.py", arguments, 1))


def report(run: RunFolder, resumed: Watched, middle: int) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for start, stop in ((1, len(rows)), (middle // 10, middle)):
        seconds = rows[stop - 1]["elapsed_seconds"] - rows[start - 1]["elapsed_seconds"]
        share = sum(row["data_wait_seconds"] for row in rows[start:stop]) / seconds
        print(f"waiting for data: {share:.2%} of the time of steps {start + 1} to {stop}")
    first = next(row for row in rows if row["step"] == middle + 1)
    took = first["elapsed_seconds"] - rows[middle - 1]["elapsed_seconds"]
    loaded = next(at for at, line in resumed.lines if "going on from" in line)
    print(
        f"resumed after step {middle}: the checkpoint was loaded {loaded:.1f} s after the start of the program, and "
        f"the first step was done {took:.2f} s later, {first['data_wait_seconds']:.2f} s of them waiting for its data"
    )


def main() -> None:
    given = parse()
    size = given.images * SIDE * SIDE * 3
    given.folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(given.folder).free) < 1.3 * size + 2**31:
        sys.exit(f"{given.folder} has {free / 1e9:.0f} GB free: {given.images:,} images take {size / 1e9:.1f} and more")
    root = Path(tempfile.mkdtemp(prefix="at-scale-", dir=given.folder))
    try:
        started = time.monotonic()
        (root / "shards").mkdir()
        make(root / "shards", "train", given.images)
        make(root / "shards", "test", 10_000)
        print(f"{given.images:,} images made in {time.monotonic() - started:.1f} s; torch {torch.__version__}")
        prepare = [sys.executable, str(ROOT / "pipeline/prepare.py"), "shards", f"{root}/shards/train-*.tar"]
        prepare += ["--test", f"{root}/shards/test-*.tar", "--name", "large", "--root", str(root)]
        Watched("preparing", prepare)
        middle = given.steps // 2
        train(given, root / "large", root / "runs", middle)
        resumed = train(given, root / "large", root / "runs", given.steps)
        run = RunFolder(root / "runs" / "large")
        report(run, resumed, middle)
        features = "--evaluation.features=[tests.data.at_scale:Pooled]"
        Watched("evaluating", launch_command(ROOT / "pipeline/evaluate.py", [str(run.path), features], 1))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
