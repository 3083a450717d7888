"""Workers of a study: real trainings, a real kill, real proposals."""

from __future__ import annotations

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend

from pipeline.config import Config, flatten, make_parser, parse
from pipeline.data import Dataset
from pipeline.distributed.process import Runtime
from pipeline.errors import EXIT_PREEMPTED, UserError
from pipeline.models.networks import Critic, Generator
from pipeline.storage.run_folder import RunFolder
from pipeline.tuning.tuner import STARTUP_TRIALS, Tuner, read_study
from tests.distributed.interrupting import LIMIT_SECONDS
from tests.jobs import ROOT, flags, launch, restoring_process, tiny_config
from tests.ranks import Job

TUNE = ROOT / "pipeline/tune.py"
SPACE = {
    "training.critic_optimizer.learning_rate": {"log": [1e-4, 1e-2]},
    "training.n_critic": {"int": [1, 2]},
    "training.ema_decay": {"choice": [0.5, 0.9]},
}


def study_file(folder: Path, **content: Any) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({"score": "fid", "seeds": [0, 1], "trials": 3, "space": SPACE} | content))
    return path


def base(root: Path, dataset: Path, **training: Any) -> Config:
    return tiny_config(
        run={"root": str(root), "checkpoint_every": 1},
        data={"dataset": str(dataset)},
        training={"steps": 6, **training},
        evaluation={"every": 2, "num_images": 100},
    )


def opened(root: Path) -> optuna.Study:
    journal = JournalFileBackend(str(root / "search/study.journal"))
    return optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(journal))


def best_config(root: Path) -> Config:
    return parse(make_parser("test"), ["--config", str(root / "search/best.yaml")])[0]


@pytest.mark.slow
def test_a_study_goes_on_after_its_workers_were_killed_and_stopped(digits: Dataset, tmp_path: Path) -> None:
    """Of two workers one is killed and the other is stopped: a third one goes on with what the latter had saved, and
    another trial takes the place of the former's."""
    file = study_file(tmp_path, trials=3)
    arguments = [str(file), *flags(base(tmp_path, digits.folder))]
    folders = [tmp_path / f"search/trial-{number:04d}-seed-0" for number in (0, 1)]
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    jobs = [Job(TUNE, arguments, 1, stdout=log, stderr=log) for log in logs]
    with jobs[0], jobs[1]:
        for number, (job, ending) in enumerate(zip(jobs, (signal.SIGKILL, signal.SIGTERM), strict=True)):
            deadline = time.monotonic() + LIMIT_SECONDS
            while not RunFolder(folders[number]).scores(2).exists():
                assert time.monotonic() < deadline, "".join(log.read_text()[-2000:] for log in logs)
                time.sleep(0.01)
            owner = json.loads(RunFolder(folders[number]).lock.read_text())["pid"]
            job = next(job for job in jobs if job.ranks[0].pid == owner)
            job.ranks[0].send_signal(ending)
            assert job.wait(60) == (-9 if ending == signal.SIGKILL else EXIT_PREEMPTED)
    last = launch(TUNE, arguments)
    assert last.returncode == 0, last.stderr[-3000:]
    everything = opened(tmp_path).trials
    assert [trial.state.name for trial in everything] == ["RUNNING", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert everything[2].params == everything[1].params
    assert f"going on from {folders[1]}/checkpoints/step-" in last.stderr
    trials = everything[2:]
    for trial in trials:
        name = trial.user_attrs.get("folder", f"trial-{trial.number:04d}")
        runs = [RunFolder(tmp_path / f"search/{name}-seed-{seed}") for seed in (0, 1)]
        fids = [json.loads(run.scores(6).read_text())["features"]["mnist"]["fid"] for run in runs]
        assert trial.value == pytest.approx(sum(fids) / 2), "the median of two is their mean"
    best = min(trials, key=lambda trial: trial.value or 0.0)
    found = flatten(best_config(tmp_path))
    assert {key: found[key] for key in SPACE} == {key: yaml.safe_load(str(best.params[key])) for key in SPACE}
    table = (tmp_path / "search/study.md").read_text()
    assert table.startswith("# search: 3 of 3 complete\n")
    assert f"| {best.number} | complete | {best.value:.4g} |" in table.splitlines()[4]
    again = launch(TUNE, arguments)
    assert again.returncode == 0, again.stderr
    results = f"trial {best.number} is best: --config {tmp_path}/search/best.yaml; all: {tmp_path}/search/study.md\n"
    assert again.stderr.endswith(f"search: 3 of 3 complete; {results}"), again.stderr
    assert len(opened(tmp_path).trials) == 5


@pytest.mark.slow
def test_a_trial_worse_than_the_others_ends_at_that_evaluation_on_all_ranks(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    journal = JournalFileBackend(str(tmp_path / "search/study.journal"))
    study = optuna.create_study(study_name="search", storage=optuna.storages.JournalStorage(journal))
    for _ in range(STARTUP_TRIALS):  # better than images can be
        study.add_trial(optuna.create_trial(value=0.0, intermediate_values={2: 900.0, 4: 0.0, 6: 0.0}))
    file = study_file(tmp_path, trials=STARTUP_TRIALS + 1)
    result = launch(TUNE, [str(file), *flags(base(tmp_path, digits.folder))], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    trial = opened(tmp_path).trials[-1]
    run = RunFolder(tmp_path / f"search/trial-{STARTUP_TRIALS:04d}-seed-0")
    fids = {step: json.loads(run.scores(step).read_text())["features"]["mnist"]["fid"] for step in (2, 4)}
    assert trial.intermediate_values == fids, "nothing was trained after the evaluation that pruned it"
    assert (trial.state.name, trial.user_attrs["reason"]) == ("PRUNED", "pruned at step 4 of seed 0")
    assert not run.path.with_name(run.path.name.replace("seed-0", "seed-1")).exists()
    assert run.export.exists()


@pytest.fixture
def tuner(digits: Dataset, tmp_path: Path) -> Iterator[Callable[..., Tuner]]:
    """Workers of one study in this process, which never train."""
    config = base(tmp_path, digits.folder)

    def configure(settings: Mapping[str, str]) -> Config:
        overrides = [f"--{key}={value}" for key, value in settings.items()]
        return parse(make_parser("test"), [*flags(config), *overrides])[0]

    with restoring_process():
        runtime = Runtime(config.runtime)
        yield lambda **content: Tuner(read_study(study_file(tmp_path, **content)), configure, runtime)
        runtime.close()


@pytest.mark.slow
def test_workers_never_share_a_trial_and_end_at_the_number_asked_for(tuner: Callable[..., Tuner]) -> None:
    workers = [tuner(trials=3) for _ in range(3)]
    taken = [worker.take() for worker in workers]
    assert [folder.name for folder, _ in filter(None, taken)] == ["trial-0000", "trial-0001", "trial-0002"]
    assert len({json.dumps(found) for _, found in filter(None, taken)}) == 3
    workers[0].tell(3.5)
    workers[1].tell("the loss is not finite")
    again = workers[0].take()
    assert again is not None, "two of three are done"
    workers[2].tell(4.5)
    assert workers[1].take() is workers[2].take() is None
    states = [(trial.state.name, trial.value) for trial in workers[0].study.trials]
    assert states == [("COMPLETE", 3.5), ("PRUNED", None), ("COMPLETE", 4.5), ("RUNNING", None)]
    workers[0].put_back(again[0])


@pytest.mark.slow
def test_a_trial_that_was_put_back_keeps_its_folder_and_its_settings(tuner: Callable[..., Tuner]) -> None:
    one, other = tuner(trials=1), tuner(trials=1)
    taken = one.take()
    assert taken is not None
    one.put_back(taken[0])
    assert other.take() == taken
    other.put_back(taken[0])
    assert one.take() == taken, "however often"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_network_outlives_its_trial(tuner: Callable[..., Tuner]) -> None:
    def networks() -> int:
        gc.collect()
        return sum(type(item) in (Generator, Critic) for item in gc.get_objects())

    before = networks()
    tuner(trials=1, seeds=[0]).run()
    assert networks() <= before


@pytest.mark.slow
def test_a_worker_alone_repeats_its_study(tuner: Callable[..., Tuner], tmp_path: Path) -> None:
    def proposals() -> list[dict[str, str]]:
        worker, found = tuner(trials=STARTUP_TRIALS + 4), []
        while (taken := worker.take()) is not None:
            found.append(taken[1])
            worker.tell(abs(float(taken[1]["training.critic_optimizer.learning_rate"]) - 1e-3))
        return found

    first = proposals()
    (tmp_path / "search").rename(tmp_path / "before")
    assert proposals() == first
    rates = [float(settings["training.critic_optimizer.learning_rate"]) for settings in first]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)


@pytest.mark.slow
def test_a_study_with_other_settings_and_a_runs_folder_are_refused(tuner: Callable[..., Tuner], tmp_path: Path) -> None:
    tuner()
    tuner(trials=7)  # may change
    message = r"search: holds a study with other settings \(seeds is \[0, 1\] there and \[0\] here\)"
    with pytest.raises(UserError, match=message):
        tuner(seeds=[0])
    RunFolder(tmp_path / "search").config.write_text("")
    with pytest.raises(UserError, match="search: holds a run: give the study's file another name"):
        tuner()
