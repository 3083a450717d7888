#!/usr/bin/env bash
# The losses of Huang et al. 2024 (R3GAN, 2501.05441) on Stacked MNIST: how many of its 1,000 modes each of them keeps.
#   launch/stacked_mnist.sh [--training.r1_penalty GAMMA] [--KEY VALUE ...]
# Trains configs/stacked_mnist.yaml as four runs of equally many steps in a new folder, with rpgan and with gan, with both
# penalties and with R1 alone, and prints modes and KL divergence beside the paper's. A run that diverges is a row as well.
# `gan` takes the mean of its two losses where the paper adds them, and so half of the penalties.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON_BIN:-.venv/bin}/python" - --run.root "runs/stacked_mnist-$(date -u +%Y%m%dT%H%M%S)" "$@" <<'END'
import sys

from pipeline import train
from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.errors import TrainingFailed
from pipeline.reporting.read import number, read_run

ROWS = {"rpgan R1 R2": "1,000 | 0.0781", "gan R1 R2": "693 | 0.927", "rpgan R1": "diverges |", "gan R1": "diverges |"}


def settings(row: str, gamma: float) -> list[str]:
    """Returns the options of a run, whose penalties have the weight `gamma` with rpgan."""
    objective, *penalties = row.split()
    weight = gamma if objective == "rpgan" else gamma / 2
    weights = {f"training.{name.lower()}_penalty": weight if name in penalties else "null" for name in ("R1", "R2")}
    options = weights | {"training.objective": objective, "run.name": row.replace(" ", "-").lower()}
    return [f"--{key}={value}" for key, value in options.items()]


def main() -> None:
    lines = ["| Losses | Step | Modes | KL | Modes in the paper | KL there |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    options = ["--config", "stacked_mnist", *sys.argv[1:]]
    gamma = parse(make_parser("train"), options)[0].training.r1_penalty or 0.0
    for row, paper in ROWS.items():
        config, _ = parse(make_parser("train"), [*options, *settings(row, gamma)])
        try:
            run, ending = train(config), ""
        except TrainingFailed as error:
            print(f"{row}: {error}", file=sys.stderr)
            run, ending = read_run(config.folder), ", diverges"
        modes, divergence = ((run.scored("mnist", key).values or [None])[-1] for key in ("modes", "mode_kl"))
        lines.append(f"| {row} | {run.step} | {number(modes)}{ending} | {number(divergence)} | {paper} |")
    print("\n".join(lines))


run_program(main)
END
