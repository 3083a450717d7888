"""The check of GPUs must be able to fail; what it can tell without one."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.benchmarking.gpu_check import __main__ as program
from pipeline.benchmarking.gpu_check import exact, worker
from pipeline.benchmarking.gpu_check.context import Context, Walk
from pipeline.benchmarking.gpu_check.launches import Ended
from pipeline.benchmarking.gpu_check.table import (
    FAILED,
    NOT_RUN,
    OK,
    Row,
    exit_code,
    goals,
    row,
    to_json,
    to_text,
    within,
)
from pipeline.benchmarking.gpu_check.worker import run_checks
from pipeline.errors import UserError
from pipeline.training.state import TrainingState
from tests.benchmarking import made_checks
from tests.jobs import ROOT, process_kept

TINY = [
    "--runtime.device=cpu",
    "--runtime.threads=1",
    "--network.width=0.05",
    "--training.batch_size=8",
    "--training.n_critic=1",
]


def verdicts(rows: list[Row]) -> list[str]:
    return [each.verdict for each in rows]


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.chdir(ROOT)
    made = Context(tmp_path, list(TINY))
    made.prepare_pictures()
    return made


@pytest.mark.parametrize(
    ("difference", "tolerance", "verdict"),
    [(0.0, 0, OK), (1e-300, 0, FAILED), (1e-9, 1e-9, OK), (2e-9, 1e-9, FAILED), (math.nan, 1.0, FAILED)],
)
def test_a_difference_holds_up_to_its_tolerance(difference: float, tolerance: float, verdict: str) -> None:
    assert within("x", tolerance, difference, "y").verdict == verdict


def test_only_rows_that_all_hold_end_with_0() -> None:
    rows = {verdict: Row("x", "", "", verdict) for verdict in (OK, NOT_RUN, FAILED)}
    for given, full, quick in [
        ([OK, OK], 0, 0),
        ([OK, NOT_RUN], 1, 0),
        ([OK, FAILED], 1, 1),
        ([], 1, 1),
    ]:
        found = [rows[verdict] for verdict in given]
        assert (exit_code(found, quick=False), exit_code(found, quick=True)) == (full, quick)


def test_goals_come_from_the_fastest_of_each_kind() -> None:
    def speed(name: str, precision: str, milliseconds: float, **more: float) -> Row:
        return row(name, "", "", True, precision=precision, step_seconds=milliseconds / 1e3, **more)

    float32 = speed("eager", "float32", 12.0, plain_seconds=0.01), speed("graph", "float32", 4.0, plain_seconds=0.01)
    found = goals([*float32, speed("bf16", "bf16", 2.0), row("other", "", "", True)])
    assert [each.seen for each in found] == ["80 s (bf16)", "160 s (graph)", "5.0 times (bf16); float32 2.5 times"]
    assert verdicts(found) == [OK, OK, OK]
    assert verdicts(goals([*float32, speed("bf16", "bf16", 2.3)])) == [FAILED, OK, FAILED]
    assert verdicts(goals([float32[0], speed("bf16", "bf16", 2.0)])) == [OK, FAILED, OK]
    assert goals([row("other", "", "", True)]) == []


def test_the_table_has_its_columns_and_its_file_is_json() -> None:
    rows = [within("a check", 1e-9, math.nan, "something"), row("another one", "little", "much", True)]
    header, first, second = to_text(rows).splitlines()
    assert header.split() == ["check", "expected", "seen", "verdict"]
    assert [first.index("nan"), first.index("FAILED")] == [header.index("seen"), header.index("verdict")]
    assert second.endswith(OK)
    saved = json.loads(to_json({"settings": []}, rows), parse_constant=lambda name: pytest.fail(name))
    assert [each["check"] for each in saved["rows"]] == ["a check", "another one"]
    assert saved["rows"][0]["numbers"] == {"difference": "NaN"}


def test_a_walk_differs_by_its_worst_number_and_deviates_by_its_mean() -> None:
    start = {"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(0)}
    one = Walk(torch.zeros(2, 3), start, {"weight": torch.tensor([2.0, 5.0]), "steps": torch.tensor(3)})
    other = one._replace(end={"weight": torch.tensor([2.0, 4.5]), "steps": torch.tensor(3)})
    assert one.difference(one) == one.deviation(one) == 0
    assert other.difference(one) == 0.5
    assert one.difference(other) == 0.5
    assert one.deviation(other) == 0.5 / (1 + 2.5)
    assert one.difference(one._replace(losses=torch.full((2, 3), 2.0))) == 2
    bad = one._replace(end={"weight": torch.tensor([math.nan, 5.0]), "steps": torch.tensor(3)})
    assert math.isnan(bad.difference(one))
    assert math.isnan(bad.deviation(one))


def test_a_crash_or_a_hang_costs_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "START_SECONDS", 0.0)
    rows = list(run_checks(made_checks.__name__, made_checks.CHECKS, tmp_path, [], minutes=10))
    seen = [(each.check, each.verdict) for each in rows]
    assert seen == [
        ("process", OK),
        ("process", OK),
        *(("first", OK), ("late", FAILED)),
        ("process", OK),
        *(("its child", OK), ("hangs", FAILED)),
        ("killed", FAILED),
        ("process", OK),
        ("too long", NOT_RUN),
    ]
    one, two, _, late, three, child, hangs, killed, four, _ = (each.seen for each in rows)
    assert one == two, "checks share a process"
    assert len({two, three, four}) == 3, "until one fails, or asks for another"
    assert late == "ValueError: one line"
    assert killed == "its process ended with -9: last words"
    assert hangs == "took longer than its 1 s"
    assert not any(is_running(int(pid)) for pid in (one, three, child, four))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def changed_load(load: Callable[..., None]) -> Callable[..., None]:
    def wrong(state: TrainingState, tensors: dict[str, torch.Tensor], step: int) -> None:
        load(state, tensors, step)
        next(iter(state.critic_optimizer.state.values()))["square_avg"].mul_(1 + 1e-6)

    return wrong


@pytest.mark.slow
def test_a_resume_is_seen_to_be_exact_or_not(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "STOPS", 1)
    with process_kept():
        assert verdicts(list(exact.resume(context, graph=False))) == [OK]
        monkeypatch.setattr(TrainingState, "load", changed_load(TrainingState.load))
        shutil.rmtree(context.folder / "runs")
        found = list(exact.resume(context, graph=False))
    assert verdicts(found) == [FAILED]
    assert 0 < found[0].numbers["difference"] < 1e-2


def test_trajectories_of_two_devices_are_compared(context: Context) -> None:
    """Both are the CPU here: the second time with other weights."""
    with process_kept():
        assert verdicts(list(exact.walk_on_cpu(context))) == [OK, OK]
        same = list(exact.against_cpu(context))
        context.arguments.append("--training.seed=1")
        other = list(exact.against_cpu(context))
    assert [each.seen for each in same] == ["0.0e+00"] * 3
    assert verdicts(same) == [OK] * 3
    assert verdicts(other) == [FAILED] * 3


def test_a_failed_job_names_the_first_error_that_is_one() -> None:
    lines = "starting\nTraceback (most recent call last):\n  raise\nRuntimeError: lost\nerror: later\n"
    assert Ended(1, 0.0, "", lines).reason() == "RuntimeError: lost"
    called = "subprocess.CalledProcessError: Command 'x'\nerror: the fix\n"
    assert Ended(1, 0.0, "", called).reason() == "error: the fix"
    assert Ended(1, 0.0, "", "done\n").reason() == ""


@pytest.mark.slow
def test_the_program_ends_with_0_only_if_all_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(file: str, name: str) -> int:
        own = ["--json", str(tmp_path / file), "--minutes", "60", "--only", name]
        monkeypatch.setattr(sys, "argv", ["gpu_check.sh", *own, "--", *TINY])
        return program.main()

    assert run("good.json", "CPU") == 0
    rows = json.loads((tmp_path / "good.json").read_text())["rows"]
    assert [each["verdict"] for each in rows] == [OK] * 5
    assert run("bad.json", "fp16") == 1
    rows = json.loads((tmp_path / "bad.json").read_text())["rows"]
    assert [each["verdict"] for each in rows] == [FAILED] * 2
    assert "runtime.precision is fp16, which takes a CUDA device" in rows[0]["seen"]
    with pytest.raises(UserError, match=r"bad\.json: exists already"):
        run("bad.json", "fp16")
    with pytest.raises(UserError, match="--only is nothing: choose from machine, "):
        run("other.json", "nothing")
