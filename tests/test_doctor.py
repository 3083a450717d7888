from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, make_parser, parse
from pipeline.data import load_dataset
from pipeline.doctor import (
    SIGNAL_SECONDS,
    Finding,
    check_disk,
    check_features,
    check_run,
    check_shares,
    check_time,
    find_dataset,
)
from pipeline.errors import UserError
from tests.jobs import ROOT, TINY, environment, launch

DOCTOR = ROOT / "pipeline/doctor.py"


def settings(dataset: Path, root: Path, *more: str) -> list[str]:
    place = ["--data.dataset", str(dataset), "--run.root", str(root), "--run.name", "checked"]
    return [*TINY, *place, "--training.steps", "50", *more]


def config_of(*arguments: str) -> Config:
    return parse(make_parser(""), arguments)[0]


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
    assert re.search(rf"error +data.dataset: on rank \d: {missing} can't be read \(No such file or directory\); ", data)
    assert re.search(
        rf"error +data.dataset: on rank \d: {flipped} is damaged, its SHA-256 is not the manifest's; ", data
    )
    assert "error    training: training.batch_size 63 cannot be shared among 2 processes: choose" in result.stdout
    assert "error    evaluation.features: the 'mnist' features score images of shape (1, 28, 28), not" in result.stdout
    assert f"error    run.root: on rank 0, 1: {mounted} can't be written to (Read-only file system)" in result.stdout


def test_ranks_that_cannot_reach_each_other_are_told_what_to_set(tiny_dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(DOCTOR), *settings(tiny_dataset, tmp_path)]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    # The launcher's place is taken by this environment: the interface fails before the second rank is missed.
    result = subprocess.run(
        [*command, "--runtime.timeout_seconds", "5"],
        env=environment() | rendezvous | {"RANK": "0", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "nowhere0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error +ranks: they can't talk to each other \(.+\); name the interface .+\n", result.stdout)


def test_errors_end_with_exit_code_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(DOCTOR), *settings(tmp_path / "nowhere", tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert f"error    data.dataset: {tmp_path}/nowhere/dataset.json does not exist: prepare" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_known_dataset_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    assert find_dataset(config_of("--data.root", str(tmp_path))) is None


def test_lanes_must_be_shared_evenly(tiny_dataset: Path) -> None:
    config = config_of("--data.source", "streaming", "--data.lanes", "8")
    with pytest.raises(UserError, match=r"data\.lanes 8 cannot be shared evenly among 16 processes"):
        list(check_shares(config, load_dataset(tiny_dataset), 16))


def test_missing_inception_weights(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, inception = load_dataset(tiny_dataset), ["--evaluation.features", "[inception]"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    [finding] = check_features(config_of(*inception), dataset)
    assert finding.level == "warning"
    assert finding.text.startswith(f"no Inception weights at {tmp_path}/hub/checkpoints/weights-inception")
    given = config_of(*inception, "--evaluation.inception_weights", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"evaluation\.inception_weights is .*none\.pth: no such file; give"):
        list(check_features(given, dataset))
    (tmp_path / "none.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not torch-fidelity's Inception v3"):
        list(check_features(given, dataset))


def test_a_disk_that_the_checkpoints_will_fill(tiny_dataset: Path, mounted: Path, tmp_path: Path) -> None:
    dataset = load_dataset(tiny_dataset)
    config = config_of(*settings(tiny_dataset, mounted, "--network.width", "0.3", "--run.checkpoint_every", "10"))
    [finding] = check_disk(config, dataset)
    assert finding.level == "error"
    assert re.match(
        r"1\.0 MiB free in .*disk, 4 checkpoints need [\d.]+; make room, or lower run\.keep_last", finding.text
    )
    roomy = dataclasses.replace(config, run=dataclasses.replace(config.run, root=str(tmp_path)))
    [finding] = check_disk(roomy, dataset)
    assert finding.level == "ok"


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_what_a_checkpoint_needs_is_what_it_takes(algorithm: str, tiny_dataset: Path, tmp_path: Path) -> None:
    """And what is there already is not asked for again."""
    optimizers = [f"--training.{role}_optimizer.algorithm={algorithm}" for role in ("critic", "generator")]
    more = ["--network.width", "0.5", "--training.steps", "2", "--run.checkpoint_every", "1", *optimizers]
    arguments = settings(tiny_dataset, tmp_path, *more)
    before = needed_mib(check_disk(config_of(*arguments), load_dataset(tiny_dataset)))
    assert launch(ROOT / "pipeline/train.py", arguments).returncode == 0
    sizes = [path.stat().st_size for path in (tmp_path / "checked/checkpoints").rglob("*") if path.is_file()]
    # Room for a third is asked for; the headers of safetensors and the manifest are not counted.
    assert before * 2**20 == pytest.approx(sum(sizes) / 2 * 3, rel=0.05)
    assert needed_mib(check_disk(config_of(*arguments), load_dataset(tiny_dataset))) < before / 2


def needed_mib(findings: Iterator[Finding]) -> float:
    [finding] = findings
    found = re.search(r"need ([\d.]+)", finding.text)
    assert found is not None, finding
    return float(found[1])


def test_a_folder_that_holds_another_run(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "checked").mkdir()
    (tmp_path / "checked/letter.txt").write_text("not a run")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        list(check_run(config_of(*settings(tiny_dataset, tmp_path)), load_dataset(tiny_dataset)))


def test_time_limits(tmp_path: Path) -> None:
    """64 x 5 images a step at 32 images/s are 10 s a step."""
    config = config_of("--run.root", str(tmp_path), "--run.name", "slow", "--run.checkpoint_every", "100")

    def level(seconds_left: float | None) -> str:
        [finding] = check_time(config, seconds_left)
        return f"{finding.level} {finding.text}"

    assert level(None).startswith("ok none is known")
    assert level(3600).startswith("ok 3480 s to train; how long a step takes is not known")
    assert level(SIGNAL_SECONDS).startswith("error the job has 120 s left and keeps 120 s")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/metrics.jsonl").write_text('{"step": 50, "images_per_second": 32.0}\n')
    assert level(SIGNAL_SECONDS + 1001).startswith(
        "ok 1001 s to train; a checkpoint every 100 steps comes every 1000 s"
    )
    tight = level(SIGNAL_SECONDS + 999)
    assert tight.startswith("warning 999 s to train")
    assert tight.endswith("set run.checkpoint_every to 24, or raise --time")
