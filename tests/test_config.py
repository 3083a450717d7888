from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import (
    Config,
    DataConfig,
    RuntimeConfig,
    configure,
    flatten,
    make_parser,
    parse,
    to_yaml,
)
from pipeline.distributed.process import choose_device
from pipeline.errors import UserError
from tests.jobs import ROOT, changed, launch


def from_arguments(*arguments: str) -> Config:
    return parse(make_parser("test"), arguments)[0]


def test_the_defaults_are_the_reference_notebook() -> None:
    config = Config()
    assert (config.training.batch_size, config.training.n_critic, config.training.clip_value) == (64, 5, 0.01)
    assert (config.training.critic_optimizer.learning_rate, config.training.critic_optimizer.rho) == (5e-5, 0.9)
    assert (config.training.steps, config.run.sample_every, config.network.latent_dim) == (40_000, 500, 100)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_lists_only_differences_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = from_arguments("--config", str(path))
    assert config.run.name == path.stem
    listed = {
        f"{section}.{key}"
        for section, values in yaml.safe_load(path.read_text()).items()
        for key, value in values.items()
        if not isinstance(value, dict)
    }
    defaults, values = flatten(Config()), flatten(config)
    same = {key for key in listed if defaults[key] == values[key]}
    assert same <= {"run.name"}, f"{path.name} lists defaults: {same}"
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert from_arguments("--config", str(saved)) == config


def test_a_file_is_overridden_by_later_arguments() -> None:
    config = from_arguments("--config", str(ROOT / "configs/lsgan.yaml"), "--training.critic_optimizer.decay", "0.5")
    assert config.training.critic_optimizer.decay == 0.5
    assert config.training.critic_optimizer.learning_rate == 2e-4


def test_a_file_comes_before_other_arguments_wherever_it_stands() -> None:
    """Or it would take back what was given before it, the run's name among them."""
    path = str(ROOT / "configs/quickstart.yaml")
    for arguments in (["--run.name", "mine", "--config", path], ["--run.name", "mine", f"--config={path}"]):
        config = from_arguments(*arguments, "--training.steps", "7")
        assert (config.run.name, config.training.steps, config.training.n_critic) == ("mine", 7, 1)


def test_the_packages_files_go_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = from_arguments("--config", str(ROOT / "configs/lsgan.yaml"))
    for name in ("lsgan", "configs/lsgan.yaml"):
        assert from_arguments("--config", name) == configure(name) == expected
        assert from_arguments(f"--config={name}", "--training.seed", "3").training.seed == 3
    for wrong in ("lsgam", "lsgan.yml", "configs/lsgan.yml"):
        with pytest.raises(UserError, match=rf"--config is {wrong}: no such file: did you mean lsgan\?$"):
            from_arguments("--config", wrong)
    (tmp_path / "gan").mkdir()
    assert from_arguments("--config", "gan").run.name == "gan", "a folder is no file"
    (tmp_path / "lsgan").write_text("training: {objective: gan}")
    assert from_arguments("--config", "lsgan").training.objective == "gan", "a file that is there comes first"


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--config is nowhere.yaml: no such file, and none of the package's: acgan,"):
        from_arguments("--config", "nowhere.yaml")


def test_a_study_is_told_from_a_file_of_settings() -> None:
    study = str(ROOT / "configs/studies/tune-quickstart.yaml")
    with pytest.raises(UserError, match=f"{study}: is a study of settings: give it to gan-pipeline tune"):
        from_arguments("--config", study)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"training:\n  steps: 7\ntraining:\n  n_critic: 3\n", "line 3: training is given twice"),
        (b"training:\n  steps: 7\n  steps: 8\n", "line 3: steps is given twice"),
        (b"\x00\xff\xfe", "is no YAML file of settings"),
        (b"[" * 10_000, "is no YAML file of settings|line 1"),
        (b"- 7\n", "it holds list; write SECTION"),
        (b"training:\n  steps: {{ steps }}\n", "is no YAML file of settings"),
        (b"run:\n  name: !!timestamp today\n", "is no YAML file of settings"),
        (b"", "it holds NoneType"),
        (b"#" * 2**20 + b"\n", "its 1,048,577 bytes are no settings"),
        (b"run: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_what_is_no_file_of_settings_is_refused_by_its_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        from_arguments("--config", str(path))
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"n_critic": 0}, "training.n_critic is 0: it must be at least 1"),
        ("training", {"clip_value": -0.1}, "training.clip_value is -0.1: it must be greater than 0"),
        ("training", {"ema_decay": 1.5}, "training.ema_decay is 1.5: it must be at most 1"),
        ("training", {"ema_decay": float("nan")}, "training.ema_decay is nan"),
        ("training", {"batch_size": 10**12}, "training.batch_size is 1000000000000: it must be at most 1048576"),
        ("evaluation", {"features": []}, "evaluation.features is empty: name one"),
        ("run", {"root": None}, "run.root is null: it needs a value"),
        ("run", {"name": "../escape"}, "run.name is '../escape'"),
        ("run", {"profile": "4"}, "run.profile is '4': give FROM:TO, two steps from 1 to 40000"),
        ("run", {"profile": "0:4"}, "run.profile is '0:4': give FROM:TO"),
        ("run", {"profile": "5:4"}, "run.profile is '5:4': give FROM:TO"),
        ("run", {"profile": "40000:40001"}, "run.profile is '40000:40001': give FROM:TO"),
        ("runtime", {"timeout_seconds": 0}, "runtime.timeout_seconds is 0: it must be at least 1"),
        ("runtime", {"timeout_seconds": -1}, "runtime.timeout_seconds is -1: it must be at least 1"),
        ("runtime", {"timeout_seconds": 10**14}, f"runtime.timeout_seconds is {10**14}: it must be at most 1000000"),
        ("data", {"source": "streaming", "lanes": 7}, "data.lanes 7 does not divide training.batch_size 64"),
    ],
)
def test_values_out_of_range_are_refused_by_name(section: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        changed(Config(), **{section: changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.n_critics", "3"], r"^training.n_critics is no setting: did you mean training.n_critic\?$"),
        (["--n_critic=3"], r"^n_critic is no setting: did you mean training.n_critic\?$"),
        (["--training.step", "5"], r"^training.step is no setting: did you mean training.steps\?$"),
        (["--training.critic_optimizer.learning_rat=5"], "did you mean training.critic_optimizer.learning_rate"),
        (
            ["--training.lr=1"],
            r"mean training.critic_optimizer.learning_rate or training.generator_optimizer.learning_rate",
        ),
        (["--training.critic_optimizer.lr=1"], r"did you mean training.critic_optimizer.learning_rate\?$"),
        (["--batch_size=8"], r"did you mean training.batch_size or evaluation.batch_size\?$"),
        (["--training.batch=8"], r"did you mean training.batch_size\?$"),
        (["--epochs", "3"], r"did you mean training.steps\?$"),
        (["--dataset", "shapes"], r"did you mean data.dataset\?$"),
        (["--network.z_dim", "64"], r"did you mean network.latent_dim\?$"),
        (["--num_workers=2"], r"did you mean data.workers\?$"),
        (["--zzz"], "^zzz is no setting: --help-all lists them$"),
        (["--version"], "^version is no setting: --help-all lists them$"),
        (["--helpall"], r"did you mean --help-all\?$"),
        (["--training.critic_optimizer.name", "adm"], "training.critic_optimizer has algorithm, learning_rate, decay,"),
        (["--config", "lsgan", "--evaluation.features", "own"], r"own: it must be a list, like '\[own\]'; .* --help$"),
        (["--config", "quickstart", "--training.steps", "ten"], "a whole number; look at --help$"),
        (["--training.n_critic", "many"], "^training.n_critic is many: it must be a whole number; look at --help$"),
        (["--training.clip_value", "many"], "^training.clip_value is many: it must be a number or null; look at"),
        (["--training.critic_updates", "both"], "^training.critic_updates is both: it must be one of joint, separate;"),
        (["--training.diff_augment", "[colour]"], "is colour: it must be one of color, translation, cutout;"),
        (["--runtime.cuda_graph", "maybe"], "^runtime.cuda_graph is maybe: it must be true or false or null;"),
        (["--runtime.timeout_seconds", "nan"], "^runtime.timeout_seconds is nan: it must be a whole number;"),
        (["--training.steps", "null"], "^training.steps is null: it must be a whole number;"),
        (["--run.tracker_options", "[1]"], "it must be a mapping, like {KEY: VALUE};"),
        (["--training.steps="], "^training.steps is empty: it must be a whole number;"),
        (
            ["--training", "7"],
            "^training is 7, but it is a section: give --training.objective or others: steps, seed,",
        ),
        (["--training.critic_optimizer", "7"], "give --training.critic_optimizer.algorithm or others: learning_rate,"),
        (["quickstart"], r"^quickstart is not understood: did you mean --config quickstart\?$"),
        (["training.steps=7"], r"^training.steps=7 is not understood: did you mean --training.steps=7\?$"),
        (["-training.steps", "7"], r"did you mean --training.steps\?$"),
        (["extra"], "^extra is not understood; look at --help$"),
        (["--training.critic_optimizer.betas", "7"], "it must be a list of two numbers;"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        from_arguments(*arguments)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.n_critic", "many"], "training.n_critic"),
        (["--training.objective", "wgann"], "training.objective is 'wgann'"),
    ],
)
def test_the_program_refuses_bad_input_in_one_line_and_touches_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = launch(ROOT / "pipeline/train.py", arguments, folder=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("training:\n  n_critics: 3\n")
    with pytest.raises(
        UserError, match=r"bad.yaml: training.n_critics is no setting: did you mean training.n_critic\?"
    ):
        from_arguments("--config", str(path))
    path.write_text("trainings:\n  n_critic: 3\n")
    with pytest.raises(UserError, match=r"bad.yaml: trainings is no setting: did you mean training\?"):
        from_arguments("--config", str(path))
    parser = make_parser("test")
    parser.add_argument("--step", type=int)
    with pytest.raises(UserError, match=r"^steps is no setting: did you mean --step\?$"):
        parse(parser, ["--steps", "7"])
    path.write_text("training:\n  n_critic: many\n")
    with pytest.raises(
        UserError, match=rf"^{path}: training.n_critic is many: it must be a whole number; look at --help$"
    ):
        from_arguments("--config", str(path), "--config", "lsgan")
    with pytest.raises(UserError, match=r"^training.steps is few: it must be a whole number; look at --help$"):
        from_arguments("--config", "quickstart", "--training.steps", "few")
    path.write_text("training:\n  n_critic: 0\n")
    with pytest.raises(UserError, match=rf"^{path}: training.n_critic is 0: it must be at least 1$"):
        from_arguments("--config", str(path), "--training.seed", "3")


def test_keys_within_a_mapping_and_at_the_end_of_a_list_are_taken() -> None:
    config = from_arguments("--run.tracker_options.wandb", "{entity: me}", "--run.trackers+=wandb")
    assert config.run.tracker_options == {"wandb": {"entity": "me"}}
    assert config.run.trackers == ["tensorboard", "wandb"]


def test_a_run_is_named_after_what_it_trains(tmp_path: Path) -> None:
    def name(*arguments: str) -> str:
        return from_arguments("--run.root", str(tmp_path), *arguments).run.name

    assert (name(), Config().run.name, name("--training.objective", "lsgan")) == ("wgan", "wgan", "lsgan")
    assert name("--data.dataset", "cifar10") == "wgan-cifar10"
    assert name("--data.dataset", str(tmp_path / "my photos"), "--training.objective", "my.losses:Hinge") == (
        "Hinge-my-photos"
    )
    assert name("--data.dataset", str(tmp_path / "mnist")) == "wgan"
    assert name("--data.dataset", "data/mnist-m") == "wgan-mnist-m"
    assert name("--config", "lsgan", "--data.dataset", "cifar10") == "lsgan", "shipped files have names"
    assert Config(data=DataConfig(dataset="cifar10")).run.name == "wgan-cifar10"
    assert configure(None, {"data.dataset": "cifar10"}).folder == Path("runs/wgan-cifar10")


def test_the_folder_of_a_run_is_printed_for_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--config", "lsgan", "--print_folder"])
    importlib.import_module("pipeline.train").main()
    assert capsys.readouterr().out == "runs/lsgan\n"


def test_the_whole_help_documents_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--help-all"])
    text = " ".join(make_parser("test").format_help().split())
    for key in flatten(Config()):
        entry = text.split(f"--{key} ", 2)[-1]
        assert re.match(r"\S+(, \S+ \S+)? \w.*?\((type:|default:)", entry), f"{key} has no docstring"


@pytest.mark.parametrize("program", ["train", "evaluate", "tune", "benchmark", "doctor"])
def test_help_shows_on_a_page_what_people_change_first(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [f"gan-pipeline {program}", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"pipeline.{program}").main()
    text = capsys.readouterr().out
    shown = re.findall(r"^  --(\w+\.[\w.]+)", text, re.MULTILINE)
    assert len(text.splitlines()) <= 60
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith(" "))
    assert len(shown) == (5 if program == "evaluate" else 10)
    assert set(shown) <= set(flatten(Config()))
    assert program == "evaluate" or "training.critic_optimizer.learning_rate" in shown
    assert "<class" not in text
    assert "--help-all lists all" in text


def test_the_key_that_may_change_between_launches_are_those_off_the_trajectory() -> None:
    fixed = flatten(Config(), free=False)
    assert {"training.seed", "training.batch_size", "network.width", "data.lanes", "runtime.precision"} <= fixed.keys()
    assert not {"training.steps", "run.log_every", "data.workers", "runtime.threads", "evaluation.every"} & fixed.keys()


@pytest.mark.parametrize(
    ("asked", "settings", "has_cuda", "captured"),
    [
        (None, {}, True, True),
        (None, {}, False, False),
        (None, {"device": "cpu"}, True, False),
        (None, {"precision": "fp16"}, True, False),
        (None, {"precision": "bf16", "accumulation": 2}, True, True),
        (True, {"device": "cuda"}, True, True),
        (False, {}, True, False),
    ],
)
def test_steps_are_captured_wherever_that_is_possible(
    asked: bool | None, settings: dict[str, Any], has_cuda: bool, captured: bool
) -> None:
    assert choose_device(RuntimeConfig(cuda_graph=asked, **settings), has_cuda)[1] == captured
