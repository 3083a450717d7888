"""Memory that runs out and ranks that do not come, each told in one line. Real processes, limits and signals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import Dataset
from pipeline.errors import EXIT_USER_ERROR
from tests.distributed.interrupting import LIMIT_SECONDS, interruptible, job, wait_for_step
from tests.jobs import ROOT, changed, flags, launch, tiny_config


@pytest.mark.parametrize(
    ("batch_size", "evaluation", "fix"),
    [
        (40_000, {}, r"raise runtime.accumulation \(1\), lower training.batch_size \(40000: 40000 images a rank\)"),
        (16, {"every": 1, "num_images": 50_000, "batch_size": 50_000}, r"lower evaluation.batch_size \(50000\)"),
    ],
    ids=["training", "evaluation"],
)
def test_what_to_lower_is_named_when_memory_runs_out(
    batch_size: int, evaluation: dict[str, Any], fix: str, digits: Dataset, mnist_dataset: Dataset, tmp_path: Path
) -> None:
    config = tiny_config(
        run={"root": str(tmp_path)},
        data={"dataset": str((digits if evaluation else mnist_dataset).folder)},
        training={"steps": 1, "batch_size": batch_size},
        evaluation=evaluation,
    )
    arguments = ["500", str(ROOT / "pipeline/train.py"), *flags(config)]
    result = launch(ROOT / "tests/distributed/short_of_memory.py", arguments)
    assert result.returncode == EXIT_USER_ERROR, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(rf"error: out of memory, \d+ bytes more were asked for, in pipeline/.*: {fix}", last), last


@pytest.mark.slow
def test_the_rank_that_does_not_come_is_named_once(tiny_dataset: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "stuck", tmp_path / "log"
    config = interruptible(tiny_dataset, tmp_path, run.name)
    # Well above what three ranks on two busy cores need for a step.
    with job(changed(config, training={"batch_size": 24}, runtime={"timeout_seconds": 20}), 3, log) as process:
        wait_for_step(run, 3, process, log)
        process.ranks[2].suspend()
        for rank in process.ranks[:2]:
            rank.wait(LIMIT_SECONDS)
        process.ranks[2].kill()
        assert process.wait(LIMIT_SECONDS) == 1
    text = log.read_text()
    assert "Traceback" not in text
    named = re.findall(r"^error: pipeline/(.*)$", text, re.MULTILINE)
    assert len(named) == 1, text
    assert "rank 2 did not come within 0:00:20 (runtime.timeout_seconds)" in named[0]


def test_a_rank_that_is_gone_ends_the_other_at_once_with_a_line(tiny_dataset: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "gone", tmp_path / "log"
    with job(interruptible(tiny_dataset, tmp_path, run.name), 2, log) as process:
        wait_for_step(run, 3, process, log)
        process.ranks[1].kill()
        assert process.wait(LIMIT_SECONDS) == -9
    text = log.read_text()
    assert "Traceback" not in text
    assert re.search(r"\[rank 0\] error: pipeline/.*: the connection to another rank is lost", text), text
