#!/usr/bin/env bash
# A run's losses beside the reference notebook's own log, of which its steps 17,701 to 22,699 (the first is 0) are known:
#   gan-pipeline train --config wgan_notebook --run.log_every 1 --training.steps 22700    # 6 hours; goes on when repeated
#   launch/notebook_log.sh [RUN]                                                          # runs/wgan_notebook
# Prints both as a Markdown table, as far as the run has come, and draws ours over the notebook's levels in
# RUN/notebook_log.png.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON_BIN:-.venv/bin}/python" - "${1:-runs/wgan_notebook}" <<'END'
import sys
from pathlib import Path

import numpy as np

from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.reporting.charts import plot
from pipeline.reporting.read import read_run

FIRST, LAST, LENGTH = 17_701, 22_699, 1_000
# Mean, standard deviation, median, 5th and 95th percentile of steps FIRST to LAST, as far as they are known, and the
# means of LENGTH steps each from FIRST on.
THEIRS = {
    "critic_loss": (-0.002253, 0.001878, -0.002170, -0.005377, 0.000678),
    "generator_loss": (-0.010701, 0.006770),
}
MEANS = {
    "critic_loss": (-0.002578, -0.002408, -0.002250, -0.002081, -0.001947),
    "generator_loss": (-0.011266, -0.010953, -0.010593, -0.010526, -0.010165),
}
STATISTICS = ("mean", "standard deviation", "median", "5th percentile", "95th percentile")


def statistics(values: np.ndarray) -> tuple[float, ...]:
    return values.mean(), values.std(), np.median(values), np.percentile(values, 5), np.percentile(values, 95)


def main() -> None:
    run = read_run(Path(sys.argv[1]))
    curves = {key: run.logged(key) for key in THEIRS}
    if not (steps := np.array(curves["critic_loss"].steps)).size or not np.array_equal(steps, 1 + np.arange(steps.size)):
        raise UserError(f"{run.folder.path}: the comparison needs every step's losses: train with --run.log_every 1")
    rows: dict[str, list[str]] = {}
    for key, known in THEIRS.items():
        values = np.array(curves[key].values)  # step s of the notebook is s + 1 here
        ours = statistics(values[FIRST : LAST + 1]) if steps.size > LAST else ()
        for place, name in enumerate(STATISTICS):
            cells = (f"{side[place]:.6f}" if place < len(side) else "" for side in (known, ours))
            rows.setdefault(f"{name}, steps {FIRST:,} to {LAST:,}", []).extend(cells)
        for start in range(FIRST % LENGTH, steps.size, LENGTH):
            end, block = min(start + LENGTH, LAST + 1), (start - FIRST) // LENGTH
            if end <= steps.size:
                theirs = f"{MEANS[key][block]:.6f}" if 0 <= block < len(MEANS[key]) else ""
                rows.setdefault(f"mean, {start:,} to {end - 1:,}", []).extend((theirs, f"{values[start:end].mean():.6f}"))
    print("| | critic, notebook | here | generator, notebook | here |", "| --- | ---: | ---: | ---: | ---: |", sep="\n")
    for name, cells in rows.items():
        print(f"| {' | '.join([name, *cells])} |")
    figure = plot({key.replace("_", " "): {"here": curve} for key, curve in curves.items()})
    for axes, (mean, deviation, *_), values in zip(figure.axes, THEIRS.values(), MEANS.values(), strict=True):
        axes.axhspan(mean - deviation, mean + deviation, color="C1", alpha=0.2, label="notebook, mean and deviation")
        axes.step(FIRST + LENGTH * np.arange(len(values)), values, color="C1", where="post", label="its means by thousand")
        axes.set_yscale("symlog", linthresh=0.01)
        axes.legend()
    figure.savefig(run.folder.path / "notebook_log.png")


run_program(main)
END
