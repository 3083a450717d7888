"""How ranks use the cores of a machine. Real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.distributed.launcher import SPIN_TURNS
from tests.jobs import ROOT, launch

CORES = sorted(os.sched_getaffinity(0))


def shares(folder: Path, num_processes: int) -> list[dict[str, Any]]:
    result = launch(ROOT / "tests/distributed/cores.py", [str(folder)], num_processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.mark.skipif(len(CORES) < 2, reason="takes two cores")
def test_each_rank_has_cores_of_its_own(tmp_path: Path) -> None:
    first, second = shares(tmp_path, 2)
    assert first["cores"] + second["cores"] == CORES
    assert first["threads"] == second["threads"] == len(CORES) // 2


def test_more_ranks_than_cores_share_all_of_them(tmp_path: Path) -> None:
    count = len(CORES) + 1
    if count > 8:
        pytest.skip("takes a process for each core and one more")
    assert shares(tmp_path, count) == [{"cores": CORES, "threads": 1, "subnormals": 0}] * count


def test_a_single_process_has_them_all_and_no_thread_keeps_subnormal_numbers(tmp_path: Path) -> None:
    assert shares(tmp_path, 1) == [{"cores": CORES, "threads": len(CORES), "subnormals": 0}]


@pytest.mark.parametrize(
    ("variables", "turns"),
    [({}, SPIN_TURNS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_spin_for_a_short_while_unless_the_user_says_otherwise(variables: dict[str, str], turns: str) -> None:
    """By what OpenMP itself prints when a program that imports torch at once has loaded it."""
    unset = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run(
        [sys.executable, str(ROOT / "pipeline/evaluate.py"), "--help"],
        env=unset | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert f"GOMP_SPINCOUNT = '{turns}'" in result.stderr
