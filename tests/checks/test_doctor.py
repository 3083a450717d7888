from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from pipeline.checks.machine import (
    SIGNAL_SECONDS,
    Caution,
    check_disk,
    check_features,
    check_time,
    find_dataset,
    run_check,
)
from pipeline.checks.settings import Plan
from pipeline.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
)
from pipeline.config import TrainingConfig as Training
from pipeline.data import load_dataset
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.storage.checkpoint import CheckpointWriter
from pipeline.storage.run_folder import RunFolder
from pipeline.training.state import build_state
from tests.jobs import ROOT, TINY, launch

DOCTOR = ROOT / "pipeline/doctor.py"


def settings(dataset: Path, root: Path, *more: str) -> list[str]:
    place = ["--data.dataset", str(dataset), "--run.root", str(root), "--run.name", "checked"]
    return [*TINY, *place, "--training.steps", "50", *more]


def levels(output: str) -> dict[str, list[str]]:
    """Subject -> its lines, each of the documented form."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        match = re.fullmatch(r"(?:ok|warning|error) +([\w. ]+): .+", line)
        assert match is not None, line
        found.setdefault(match[1], []).append(line)
    return found


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_sound_run_is_found_so_by_two_ranks_and_nothing_is_left_behind(tiny_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "below" / "runs"
    result = launch(DOCTOR, settings(tiny_dataset, root, "--data.source", "streaming", "--checksums", "all"), 2)
    assert result.returncode == 0, result.stderr
    lines = [line for lines in levels(result.stdout).values() for line in lines]
    assert all(line.startswith("ok ") for line in lines), result.stdout
    for text in (
        "ranks: 2, on ",
        "gloo sums 4 MiB correctly in",
        "600 train images in 3 shards, 2 of 2 hashed on the first rank",
    ):
        assert text in result.stdout
    assert "training.batch_size 64 is 32 a rank, data.lanes 8 are 4" in result.stdout
    assert not list(tmp_path.iterdir())


def test_everything_that_is_wrong_is_told_at_once(tiny_dataset: Path, mounted: Path, tmp_path: Path) -> None:
    """A shard is missing, another has a flipped bit, two ranks can't share the batch, the features don't take the
    images, and the disk can't be written to, by root either."""
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    missing, flipped, _ = sorted(dataset.glob("train-*.tar"))
    missing.unlink()
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    more = ["--training.batch_size", "63", "--evaluation.every", "10"]
    result = launch(DOCTOR, settings(dataset, mounted, *more), 2)
    assert result.returncode != 0
    found = levels(result.stdout)
    assert found["ranks"][0].startswith("ok ")
    data = "\n".join(found["data.dataset"])
    for problem in (
        rf"{missing} can't be read \(No such file or directory\)",
        f"{flipped} has not the manifest's SHA-256",
    ):
        assert re.search(rf"error +data.dataset: on rank \d: 1 of [12] shards damaged: {problem}; copy", data)
    assert "error    training: training.batch_size 63 cannot be shared among 2 processes: choose" in result.stdout
    assert "error    evaluation.features: the 'mnist' features know MNIST's digits alone, and" in result.stdout
    assert f"error    run.root: {mounted} can't be written to (Read-only file system)" in result.stdout


def test_ranks_that_cannot_reach_each_other_are_told_what_to_set(tiny_dataset: Path, tmp_path: Path) -> None:
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    # The launcher's place is taken by this environment: the interface fails before the second rank is missed.
    alone = rendezvous | {"RANK": "0", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "nowhere0"}
    result = launch(DOCTOR, [*settings(tiny_dataset, tmp_path), "--runtime.timeout_seconds", "5"], variables=alone)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error +ranks: they can't talk to each other \(.+\); name the interface .+\n", result.stdout)


def test_errors_end_with_exit_code_2(tmp_path: Path) -> None:
    result = launch(DOCTOR, settings(tmp_path / "nowhere", tmp_path))
    assert result.returncode == 2, result.stderr
    assert f"error    data.dataset: {tmp_path}/nowhere/dataset.json does not exist: prepare" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_known_dataset_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    with pytest.raises(Caution, match=r"mnist is not prepared in .*, the training will fetch it first; run"):
        find_dataset(Config(data=DataConfig(root=str(tmp_path))))


def test_missing_inception_weights(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(path: Path | None) -> Plan:
        evaluation = EvaluationConfig(features=["inception"], inception_weights=str(path) if path else None)
        return Plan(Config(evaluation=evaluation), 1, load_dataset(tiny_dataset))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(Caution, match=rf"Inception v3 weights are not at {tmp_path}/hub/checkpoints/weights-inc"):
        check_features(plan(None), "inception")
    given = tmp_path / "none.pth"
    with pytest.raises(UserError, match=r"evaluation\.inception_weights is .*none\.pth: no such file; give"):
        check_features(plan(given), "inception")
    given.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not torch-fidelity's Inception v3"):
        check_features(plan(given), "inception")


def disk_plan(dataset: Path, root: Path, *, width: float, training: Training, every: int) -> Plan:
    run = RunConfig(root=str(root), name="checked", checkpoint_every=every)
    return Plan(Config(run=run, network=NetworkConfig(width=width), training=training), 1, load_dataset(dataset))


def test_a_disk_that_the_checkpoints_will_fill(tiny_dataset: Path, mounted: Path, tmp_path: Path) -> None:
    for root in (mounted, tmp_path):
        plan = disk_plan(tiny_dataset, root, width=0.3, training=Training(steps=50), every=10)
        if root == mounted:
            match = r"1\.0 MiB free in .*disk, 4 checkpoints need [\d.]+; make room, or lower run\.keep_last"
            with pytest.raises(UserError, match=match):
                check_disk(plan)
        else:
            assert "4 checkpoints need" in check_disk(plan)


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_what_a_checkpoint_needs_is_what_it_takes(
    algorithm: Literal["rmsprop", "adam"],
    precision: Literal["float32", "float64"],
    tiny_dataset: Path,
    tmp_path: Path,
) -> None:
    """And what is there already is not asked for again."""
    optimizer = OptimizerConfig(algorithm=algorithm)
    training = Training(steps=2, critic_optimizer=optimizer, generator_optimizer=optimizer)
    plan = disk_plan(tiny_dataset, tmp_path, width=0.5, training=training, every=1)
    plan = replace(plan, config=replace(plan.config, runtime=RuntimeConfig(precision=precision)))
    before = needed_mib(check_disk(plan))
    assert plan.dataset is not None
    scaler = torch.amp.GradScaler(enabled=False)
    state = build_state(plan.config, plan.dataset.image_shape, 0, torch.device("cpu"), scaler)
    for network, updates in ((state.generator, state.generator_optimizer), (state.critic, state.critic_optimizer)):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        updates.step()
    run = RunFolder(plan.config.folder)
    run.path.mkdir()
    run.config.touch()
    writer = CheckpointWriter(run, Ranks(), keep_last=3, keep_every=None)
    for step in (1, 2):
        writer.save(state.tensors(), step, {})
    writer.finish()
    sizes = [path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file()]
    # Room for a third is asked for; the headers of safetensors and the manifest are not counted.
    assert before * 2**20 == pytest.approx(sum(sizes) / 2 * 3, rel=0.05)
    assert needed_mib(check_disk(plan)) < before / 2


def needed_mib(text: str) -> float:
    found = re.search(r"need ([\d.]+)", text)
    assert found is not None, text
    return float(found[1])


def test_time_limits(tmp_path: Path) -> None:
    """64 x 5 images a step at 32 images/s are 10 s a step."""
    config = Config(run=RunConfig(root=str(tmp_path), name="slow", checkpoint_every=100))

    def line(seconds_left: float | None) -> str:
        finding = run_check("time limit", lambda: check_time(config, seconds_left))
        return f"{finding.level} {finding.text}"

    assert line(None).startswith("ok none is known")
    assert line(3600).startswith("ok 3480 s to train; how long a step takes is not known")
    assert line(SIGNAL_SECONDS).startswith("error the job has 120 s left and keeps 120 s")
    RunFolder(config.folder).path.mkdir()
    RunFolder(config.folder).metrics.write_text('{"step": 50, "images_per_second": 32.0}\n')
    assert line(SIGNAL_SECONDS + 1001).startswith("ok 1001 s to train; a checkpoint every 100 steps comes every 1000 s")
    tight = line(SIGNAL_SECONDS + 999)
    assert tight.startswith("warning 999 s to train")
    assert tight.endswith("set run.checkpoint_every to 24, or raise --time")
    training = Training(burn_in_n_critic=105, burn_in_every=125)  # one of the next 100 steps takes 100 iterations more
    config = replace(config, training=training)
    assert line(3600).endswith("a checkpoint every 100 steps comes every 1200 s")
