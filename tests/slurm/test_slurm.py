"""The project's own batch scripts, unchanged, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.data.prepare import ShardSizes, prepare_npz
from pipeline.storage.checkpoint import newest_intact
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, TINY, final_state, launch
from tests.slurm.cluster import NODES, Cluster, until, why_impossible

pytestmark = pytest.mark.slurm
STEPS = 40
"""Each with a checkpoint, so that no machine is through before a signal arrives."""
RESEND_SECONDS = 90
"""After which slurmctld has sent again what a dead node did not take: it does so each minute."""
JOB_SECONDS = 400
"""Generous: four ranks start at once, on a machine that may run other tests."""
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_impossible():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, but there can be no cluster: {reason}")
        pytest.skip(reason)
    running = Cluster()
    try:
        yield running
    finally:
        running.stop()


@dataclass(frozen=True)
class Project:
    """A checkout to submit from; its logs and runs are its own."""

    folder: Path
    cluster: Cluster
    settings: tuple[str, ...]
    """Of a tiny run, for every program."""

    def submit(self, *command: str, **environment: str) -> list[str]:
        """Runs a script that prints the numbers of the jobs it submitted."""
        own = {"PYTHON_BIN": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
        return self.cluster.run(*command, folder=self.folder, environment=own | environment).split()

    def job(self, number: str) -> dict[str, str]:
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return dict(re.findall(r"(\w+)=(.*?)(?= +\w+=| *$)", shown))

    def log(self, number: str) -> str:
        logs = [*self.folder.glob(f"slurm-*-{number}.log"), *self.folder.glob(f"slurm-*-{number}/*.log")]
        return "".join(f"== {path.name}\n{path.read_text()}" for path in logs)

    def wait_for_end(self, *numbers: str) -> list[str]:
        """The states that the jobs end in."""
        for number in numbers:
            until(lambda: self.job(number)["JobState"] in DONE, f"job {number}", JOB_SECONDS, lambda: self.log(number))  # noqa: B023
        return [self.job(number)["JobState"] for number in numbers]

    def wait_for_step(self, run: Path, step: int, number: str) -> None:
        def reached() -> bool:
            assert self.job(number)["JobState"] not in DONE, self.log(number)
            return last_step(run) >= step

        until(reached, f"step {step}", JOB_SECONDS, lambda: self.log(number))


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    for name in ("launch", "pipeline", "configs"):
        (folder / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (600, 28, 28), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(600) % 10)
    files = {split: folder / "images.npz" for split in ("train", "test")}
    dataset = prepare_npz(folder, "random", files, ShardSizes(50, 200), kind="mnist")
    settings = ("--data.dataset", str(dataset.folder), "--run.root", str(folder / "runs"))
    return Project(folder, cluster, (*TINY, "--evaluation.num_images", "100", *settings))


def training(project: Project, name: str) -> list[str]:
    return [
        *project.settings,
        *("--run.name", name, "--training.steps", str(STEPS), "--run.checkpoint_every", "1"),
        *("--training.n_critic", "1"),
    ]


def assert_same_end(project: Project, run: Path, num_processes: int) -> None:
    """As the same training without Slurm and without an interruption."""
    name = f"reference-{num_processes}"
    result = launch(ROOT / "pipeline/train.py", training(project, name), num_processes)
    assert result.returncode == 0, result.stderr
    left, right = final_state(run, STEPS), final_state(project.folder / "runs" / name, STEPS)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, STEPS + 1)
    ]


@dataclass(frozen=True)
class Chain:
    run: Path
    train: str
    evaluate: str
    report: str


@pytest.fixture(scope="module")
def chain(project: Project) -> Chain:
    """Training that gets USR1 in its middle, evaluation, report."""
    run = project.folder / "runs/chained"
    options = ["--nodes=2", "--gpus-per-node=1", "--time=30"]
    train, evaluate, report = project.submit("launch/slurm/chain.sh", *options, "--", *training(project, run.name))
    project.wait_for_step(run, 3, train)
    project.cluster.run("scancel", "--batch", "--signal=USR1", train)
    until(lambda: project.job(train)["Restarts"] == "1", "the requeue", JOB_SECONDS, lambda: project.log(train))
    assert newest_intact(RunFolder(run))[0] is not None
    assert project.wait_for_end(train, evaluate, report) == ["COMPLETED"] * 3, project.log(train) + project.log(
        evaluate
    )
    return Chain(run, train, evaluate, report)


def test_usr1_before_the_limit_saves_requeues_and_goes_on(project: Project, chain: Chain) -> None:
    log = project.log(chain.train)
    stopped = re.search(r"stopped after step (\d+), which is saved", log)
    assert stopped is not None, log
    assert 3 <= int(stopped[1]) < STEPS
    assert re.search(rf"going on from \S+step-{int(stopped[1]):08d}, saved at world size 2", log), log
    assert project.job(chain.train)["Restarts"] == "1"


def test_a_requeued_run_ends_as_an_uninterrupted_one(project: Project, chain: Chain) -> None:
    assert_same_end(project, chain.run, 2)


def test_the_evaluation_starts_after_training_and_leaves_its_report(project: Project, chain: Chain) -> None:
    train, evaluate, report = (project.job(number) for number in (chain.train, chain.evaluate, chain.report))
    assert train["EndTime"] <= evaluate["StartTime"] <= evaluate["EndTime"] <= report["StartTime"]
    scores = json.loads((chain.run / f"evaluation/step-{STEPS:08d}.json").read_text())
    assert scores["features"]["mnist"]["fid"] > 0
    assert "FID" in (chain.run / "report.html").read_text()


def test_the_job_comment_tells_the_step(project: Project, chain: Chain) -> None:
    assert project.job(chain.train)["Comment"] == f"step {STEPS} of {STEPS}"


def test_the_doctor_looks_before_the_training(project: Project, chain: Chain) -> None:
    log = (project.folder / f"slurm-train-{chain.train}.log").read_text()
    assert re.search(r"ok +ranks: 2, on .*; gloo sums 4 MiB correctly", log), log
    assert re.search(r"ok +time limit: \d+ s to train", log), log


def test_a_run_whose_node_died_is_intact_and_a_requeue_finishes_it(project: Project, cluster: Cluster) -> None:
    """With two ranks a node, of which each but the first has a log of its own."""
    run, arguments = project.folder / "runs/widowed", training(project, "widowed")
    options = ["--parsable", "--nodes=2", "--gpus-per-node=2"]
    [number] = project.submit("sbatch", *options, "launch/slurm/train.sbatch", *arguments, DOCTOR="0")
    project.wait_for_step(run, 4, number)
    killed = time.monotonic()
    cluster.kill_node(NODES[1])
    until(lambda: project.job(number)["Restarts"] == "1", "the requeue", JOB_SECONDS, lambda: project.log(number))
    checkpoint, damaged = newest_intact(RunFolder(run))
    assert checkpoint is not None
    assert damaged == []
    assert checkpoint.step < STEPS
    # The order to end this step that the dead node did not take is sent again after a minute, and the job's second life
    # has a step of the same name: it begins once that is over.
    project.cluster.run("scontrol", "hold", number)
    cluster.start_node(NODES[1])
    time.sleep(max(0.0, killed + RESEND_SECONDS - time.monotonic()))
    project.cluster.run("scontrol", "release", number)
    assert project.wait_for_end(number) == ["COMPLETED"], project.log(number)
    assert_same_end(project, run, 4)
    logs = {path.name for path in (project.folder / f"slurm-train-{number}").iterdir()}
    assert logs == {"rank-1.log", "rank-2.log", "rank-3.log"}


def test_a_sweep_ends_with_a_comparison(project: Project) -> None:
    few = ["--training.steps", "2", "--evaluation.every", "2", "--training.n_critic", "1"]
    array, report = project.submit(
        *("launch/slurm/sweep.sh", "config=configs/wgan.yaml,configs/lsgan.yaml", "training.seed=1"),
        *("--nodes=1", "--", *project.settings, *few),
        DOCTOR="0",
    )
    assert project.wait_for_end(report) == ["COMPLETED"], project.log(array) + project.log(report)
    names = {"wgan-seed-1", "lsgan-seed-1"}
    page = (project.folder / "runs/comparison.html").read_text()
    for name in names:
        assert name in page
        run = project.folder / "runs" / name
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert f"{config['training']['objective']}-seed-{config['training']['seed']}" == name
        assert (run / "evaluation/step-00000002.json").exists()
    tasks = comments_of(project, array)
    assert len(tasks) == 2
    assert all(
        re.fullmatch(r"step 2 of 2, mnist FID [\d,.]+ \(floor [\d,.]+\) at step 2", comment) for comment in tasks
    ), tasks


def test_the_help_of_a_sweep_needs_no_cluster(project: Project) -> None:
    told = project.cluster.run("launch/slurm/sweep.sh", "--help", folder=project.folder)
    assert "sweep.sh [--dry-run] KEY=VALUE,VALUE,..." in told


def test_the_tasks_of_an_array_work_on_one_study_and_go_on_after_a_requeue(project: Project) -> None:
    space = {"training.critic_optimizer.learning_rate": {"log": [1e-5, 1e-3]}, "training.n_critic": {"int": [1, 2]}}
    study = {"score": "fid", "seeds": [0, 1], "trials": 3, "space": space}
    (project.folder / "search.yaml").write_text(yaml.safe_dump(study))
    settings = [*project.settings, "--training.steps", "6", "--evaluation.every", "2", "--run.checkpoint_every", "1"]
    [array] = project.submit(
        *("sbatch", "--parsable", "--array=0-1", "--nodes=1", "--time=30", "launch/slurm/tune.sbatch"),
        *("search.yaml", *settings),
    )
    folder = project.folder / "runs/search"
    first = RunFolder(folder / "trial-0000-seed-0")
    until(first.scores(2).exists, "the first evaluation", JOB_SECONDS, lambda: project.log(array))
    project.cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_0")
    until(lambda: project.job(f"{array}_0")["Restarts"] == "1", "the requeue", JOB_SECONDS, lambda: project.log(array))
    tasks = [f"{array}_0", f"{array}_1"]
    assert project.wait_for_end(*tasks) == ["COMPLETED"] * 2, project.log(array)
    journal = (folder / "study.journal").read_text()
    # The one that was put back is created again, and two workers may begin the last one at once.
    assert journal.count('"op_code":4') in (4, 5), "trials created"
    table = (folder / "study.md").read_text()
    assert re.match(r"# search: \d of [34] complete\n", table)
    assert "running" not in table
    values = [float(row.split("|")[3]) for row in table.splitlines()[4:] if "| complete |" in row]
    assert values == sorted(values) != []
    best = project.cluster.run(
        sys.executable, "-m", "pipeline", "train", "--print_folder", "--config", str(folder / "best.yaml"), folder=ROOT
    )
    assert best == str(project.folder / "runs/search-best")


def comments_of(project: Project, array: str) -> list[str]:
    shown = project.cluster.run("scontrol", "--oneliner", "show", "job", array)
    return re.findall(r" Comment=(.*?)(?= +\w+=| *$)", shown, re.MULTILINE)


def test_a_mistake_is_not_queued_again(project: Project) -> None:
    """Neither one that the doctor finds, nor one that meets the signal before the limit."""
    sbatch = ["sbatch", "--parsable", "--nodes=1"]
    [hasty] = project.submit(*sbatch, "--time=1", "launch/slurm/train.sbatch", *training(project, "hasty"))
    odd = [*training(project, "odd"), "--training.batch_size", "63"]
    [odd_job] = project.submit(*sbatch, "--time=30", "launch/slurm/train.sbatch", *odd, RANKS_PER_NODE="2", DOCTOR="0")
    until((project.folder / f"slurm-train-{odd_job}").exists, "the job to start", JOB_SECONDS)
    time.sleep(1)  # the trap is set by now, and the ranks need longer to start
    project.cluster.run("scancel", "--batch", "--signal=USR1", odd_job)
    assert project.wait_for_end(hasty, odd_job) == ["FAILED", "FAILED"], project.log(hasty) + project.log(odd_job)
    assert [project.job(number)["Restarts"] for number in (hasty, odd_job)] == ["0", "0"]
    assert re.search(r"error +time limit: the job has \d+ s left and keeps 120 s", project.log(hasty))
    assert "error: training.batch_size 63 cannot be shared among 2 processes" in project.log(odd_job)
    assert not (project.folder / "runs/hasty").exists()
    assert not (project.folder / "runs/odd").exists()
