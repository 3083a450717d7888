"""The rank that holds up the others is the one that is named, though all take a step in the same time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.slow_rank import BURDEN_SECONDS
from tests.jobs import ROOT, flags, launch, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize(("burden", "waits"), [("reads", True), ("computes", False)])
def test_a_rank_with_a_burden_of_its_own_is_named_once_and_the_run_goes_on(
    burden: str, waits: bool, tiny_dataset: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        data={"dataset": str(tiny_dataset)},
        training={"steps": 4, "batch_size": 8, "n_critic": 1},
        run={"root": str(tmp_path)},
    )
    result = launch(ROOT / "tests/distributed/slow_rank.py", [burden, *flags(config)], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    # Rank 0 waited for each burden of rank 1, and none of that is busy time of its own.
    named = re.findall(r"step (\d): rank (\d) on \S+ is slow, .* waits (\S+) s for data", result.stderr)
    assert [rank for _, rank, _ in named] == ["1"], result.stderr
    assert (float(named[0][2]) >= BURDEN_SECONDS) == waits
    lines = [json.loads(line) for line in (tmp_path / "wgan/metrics.jsonl").read_text().splitlines()]
    assert [line["slowest_rank"] for line in lines] == [1] * 4
    assert all(line["rank_seconds_max"] >= BURDEN_SECONDS > line["rank_seconds_min"] for line in lines[1:])
