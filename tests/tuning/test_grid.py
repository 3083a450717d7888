from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import make_parser, parse
from pipeline.errors import UserError
from pipeline.export.generator_file import save_export
from pipeline.storage.run_folder import RunFolder
from pipeline.tuning.grid import main, runs_of
from tests.export.generators import random_generator
from tests.jobs import ROOT, launch

WGAN, LSGAN = (str(ROOT / f"configs/{name}.yaml") for name in ("wgan", "lsgan"))


def names(grid: list[str], given: list[str]) -> list[str]:
    configs = [parse(make_parser("test"), run)[0] for run in runs_of(grid, given)]
    return [config.run.name for config in configs]


def test_every_combination_is_a_run_with_a_name_of_its_values() -> None:
    grid = [f"config={WGAN},{LSGAN}", "training.seed=0,1,2"]
    runs = [parse(make_parser("test"), run)[0] for run in runs_of(grid, ["--training.steps", "7"])]
    assert [run.run.name for run in runs] == [f"{name}-seed-{seed}" for name in ("wgan", "lsgan") for seed in (0, 1, 2)]
    assert [run.training.objective for run in runs] == ["wgan"] * 3 + ["lsgan"] * 3
    assert [run.training.seed for run in runs] == [0, 1, 2] * 2
    assert {run.training.steps for run in runs} == {7}
    assert runs_of(["config=wgan,lsgan"], []) == [
        ["--config=wgan", "--run.name=wgan"],
        ["--config=lsgan", "--run.name=lsgan"],
    ]


def test_settings_of_any_key_and_kind() -> None:
    rates = "training.critic_optimizer.learning_rate=1e-3,1e-4"
    grid = [
        rates,
        "training.generator_optimizer.learning_rate=0.01",
        "training.critic_optimizer.betas=[0,0.9],[0.5,0.9]",
    ]
    given = ["--config", LSGAN, "--run.name", "base"]
    runs = [parse(make_parser("test"), run)[0] for run in runs_of(grid, given)]
    assert [run.training.critic_optimizer.learning_rate for run in runs] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert {run.training.generator_optimizer.learning_rate for run in runs} == {0.01}
    assert [run.training.critic_optimizer.betas for run in runs] == [(0.0, 0.9), (0.5, 0.9)] * 2
    assert runs[0].run.name == (
        "base-critic_optimizer.learning_rate-1e-3-generator_optimizer.learning_rate-0.01-betas-_0_0.9_"
    )
    assert len({run.folder for run in runs}) == 4


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["training.seed=1,1"], "wgan-seed-1 would be the name of two runs"),
        (["training.seed=1,,2"], "training.seed in the grid: give a key once"),
        (["training.seed=1", "training.seed=2"], "training.seed in the grid: give a key once"),
        (["run.name=a,b"], "run.name in the grid"),
        ([f"config={WGAN},./configs/../{WGAN}"], "wgan would be the name of two runs"),
    ],
)
def test_grids_without_a_name_for_each_run_are_refused(grid: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        names(grid, [])


@pytest.mark.slow
def test_a_run_is_finished_once_its_last_steps_generator_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfinished(steps: int) -> str:
        given = ["--run.root", str(tmp_path), "--training.steps", str(steps)]
        monkeypatch.setattr("sys.argv", ["grid", "--unfinished", "training.seed=0,1,2,3,4", "--", *given])
        main()
        return capsys.readouterr().out.strip()

    def export(seed: int, step: int) -> RunFolder:
        folder = RunFolder(tmp_path / f"wgan-seed-{seed}")
        save_export(random_generator(), folder.export, {"step": step})
        return folder

    assert unfinished(20) == "0,1,2,3,4"
    export(1, 20)
    patient = export(2, 6)
    patient.config.touch()
    patient.evaluation.mkdir()
    patient.best_scores.write_text(json.dumps({"last_step": 6}))  # no better score came
    export(3, 10).export.write_bytes(b"cut short")
    export(4, 10)
    assert unfinished(20) == "0,3,4"
    assert unfinished(30) == "0,1,3,4", "of more steps than it was trained for"
    for seed in (0, 3, 4):
        export(seed, 20)
    assert unfinished(20) == ""


def test_a_wrong_value_is_refused_before_anything_is_submitted() -> None:
    result = launch("pipeline.tuning.grid", ["training.n_critic=1,0", "--", "--config", WGAN])
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: training.n_critic is 0: it must be at least 1"
    assert result.stdout == ""
