from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, make_parser, parse
from pipeline.errors import UserError
from pipeline.tuning.tuner import Range, read_study
from tests.jobs import ROOT


def configure(settings: Mapping[str, str]) -> Config:
    return parse(make_parser("test"), [f"--{key}={value}" for key, value in settings.items()])[0]


def written(folder: Path, content: object) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


SOUND = {"score": "fid", "seeds": [0, 1], "trials": 3, "space": {"training.n_critic": {"int": [1, 3]}}}


def test_ranges_are_read_as_written(tmp_path: Path) -> None:
    space = {
        "training.clip_value": {"log": ["1e-2", 1]},  # YAML takes 1e-2 for text
        "training.ema_decay": {"uniform": [0, 0.5]},
        "training.n_critic": {"int": [1, 3]},
        "training.critic_optimizer.betas": {"choice": [[0.0, 0.9], [0.5, 0.9]]},
        "training.objective": {"choice": ["wgan", "lsgan"]},
    }
    study = read_study(written(tmp_path, SOUND | {"space": space}))
    assert study.name == "search"
    assert list(study.space.values()) == [
        Range("log", (0.01, 1.0)),
        Range("uniform", (0.0, 0.5)),
        Range("int", (1, 3)),
        Range("choice", ("[0.0, 0.9]", "[0.5, 0.9]")),
        Range("choice", ("wgan", "lsgan")),
    ]
    study.check(configure)


def test_the_shipped_study_is_sound() -> None:
    for path in (ROOT / "configs/studies").glob("*.yaml"):
        read_study(path).check(configure)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, r"search.yaml: trials is 0: write trials: N$"),
        ({"trials": "two"}, "trials is two: write"),
        ({"seeds": []}, r"seeds is \[\]: write seeds: \[N, \.\.\.\]$"),
        ({"score": 3}, "score is 3: write score: NAME"),
        ({"space": {}}, "space is {}: write space: {KEY: RANGE"),
        ({"training": {"steps": 3}}, r"training is no part of a study, which has score, seeds, trials, space: give"),
        ({"space": {"training.n_critic": {"int": [3, 1]}}}, r"space.training.n_critic is .*: write it as"),
        ({"space": {"training.n_critic": {"int": [1]}}}, "space.training.n_critic is"),
        ({"space": {"training.n_critic": [1, 2]}}, "space.training.n_critic is"),
        ({"space": {"training.clip_value": {"log": [0, 1]}}}, "space.training.clip_value is"),
        ({"space": {"training.clip_value": {"normal": [0, 1]}}}, "space.training.clip_value is"),
        ({"space": {"training.clip_value": {"choice": []}}}, "space.training.clip_value is"),
        ({"space": {"training.objective": {"choice": "gan"}}}, "space.training.objective is {'choice': 'gan'}"),
        ({"space": {"training.n_critic": {"int": [0.5, 3.9]}}}, "space.training.n_critic is"),
        ({"space": {"training.seed": {"int": [0, 1]}}}, "space.training.seed cannot be searched"),
        ({"space": {"training.steps": {"int": [5, 9]}}}, "space.training.steps cannot be searched"),
        ({"space": {"training.clip_valu": {"int": [0, 1]}}}, "space.training.clip_valu .* mean training.clip_value"),
        ({"space": {"training.n_critic": {"int": [0, 3]}}}, "training.n_critic is 0: it must be at least 1"),
        ({"score": "mnist.fids"}, "score is mnist.fids, which is no score"),
    ],
)
def test_what_is_no_study_is_refused_by_name(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_study(written(tmp_path, SOUND | change)).check(configure)


def test_an_entry_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.yaml: seeds is missing: write seeds: \[N"):
        read_study(written(tmp_path, {key: value for key, value in SOUND.items() if key != "seeds"}))
