"""README's cost model of communication beside seconds that were measured, by hand and as root:

    python -m tests.distributed.communication --config configs/wgan.yaml --network.width 0.25

Two ranks in network namespaces take the same steps at three bandwidths and three delays. What the network costs is the
median step less the median step where the network is not limited.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time

from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.training.trainer import Trainer
from tests.distributed.network import Network
from tests.jobs import ROOT, launch

MEGABITS, DELAYS_SECONDS = (20, 100, 500), (0.001, 0.01, 0.04)
WARM_UP, STEPS = 2, 7
COLLECTIVES, DELAYS = 14, 5
"""Of a step of the reference; one-way delays of each over gloo, where two messages follow one another, each after the
word that its receiver is ready: found here, the model had said two."""


def main() -> None:
    """A rank: medians of a step's seconds, and what a step sends, on standard output."""
    config, _ = parse(make_parser("measure"), sys.argv[1:])
    runtime = Runtime(config.runtime)
    trainer = Trainer(config, runtime)
    seconds = []
    for step in range(WARM_UP + STEPS):
        runtime.ranks.any(False)
        started = time.monotonic()
        trainer.take_step()
        if step >= WARM_UP:
            seconds.append(time.monotonic() - started)
    sizes = [
        sum(weight.nbytes for weight in each.parameters()) for each in (trainer.state.critic, trainer.state.generator)
    ]
    if runtime.ranks.is_main:
        num_bytes = config.training.n_critic * sizes[0] + sizes[1]
        print(json.dumps({"seconds": statistics.median(seconds), "bytes": num_bytes}))
    runtime.close()


def measured(arguments: list[str], megabits: float | None, delay_seconds: float) -> dict[str, float]:
    with Network(2, megabits=megabits, delay_seconds=delay_seconds) as network:
        names = ",".join(network.names)
        place = [names, "1", str(ROOT / "tests/distributed/communication.py"), *arguments]
        result = launch(ROOT / "tests/distributed/in_namespace.py", place, 2)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


def predicted(num_bytes: float, megabits: float, delay_seconds: float) -> float:
    """README's, of two ranks: a ring moves 2 (W - 1) / W of the bytes, here all of them, through each link; beside that
    a collective takes DELAYS."""
    return num_bytes / (megabits * 1e6 / 8) + COLLECTIVES * DELAYS * delay_seconds


def compare(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        own = ["--run.root", root, "--run.trackers", "[]", "--evaluation.every", "null", "--runtime.device", "cpu"]
        arguments = [*arguments, *own, "--runtime.threads", "1"]
        free = measured(arguments, None, 0.0)
        print(f"{free['bytes'] / 1e6:.2f} MB of gradients a step, {free['seconds']:.3f} s a step without limits")
        print("| Mb/s | delay, ms | predicted, s | seen, s | seen / predicted |\n| ---: | ---: | ---: | ---: | ---: |")
        for megabits, delay in itertools.product(MEGABITS, DELAYS_SECONDS):
            expected = predicted(free["bytes"], megabits, delay)
            seen = measured(arguments, megabits, delay)["seconds"] - free["seconds"]
            row = f"| {megabits} | {delay * 1e3:.0f} | {expected:.3f} | {seen:.3f} | {seen / expected:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_program(main)
    compare(sys.argv[1:])
