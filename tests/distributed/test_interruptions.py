"""Signals, kills and rot: what a shared cluster does to a run. Real processes and signals; the real launcher where it
has a part in it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.config import OptimizerConfig
from pipeline.errors import EXIT_FAILED, EXIT_PREEMPTED
from pipeline.storage.checkpoint import find, newest_intact
from pipeline.storage.run_folder import RunFolder
from tests.distributed.drift import FAULTS
from tests.distributed.interrupting import (
    LIMIT_SECONDS,
    TRAIN,
    Running,
    assert_ends_as_if_nothing_had_been,
    interruptible,
    job,
    last_step,
    launched,
    ranks,
    wait_for_step,
)
from tests.jobs import ROOT, changed, flags, launch
from tests.ranks import Job


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_to_any_rank_stops_all_after_a_save(
    number: signal.Signals, num_processes: int, tiny_dataset: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "signalled", tmp_path / "log"
    config = interruptible(tiny_dataset, tmp_path, run.name)
    with job(config, num_processes, log) as process:
        wait_for_step(run, 7, process, log)
        process.ranks[-1].send_signal(number)
        assert process.wait(timeout=30) == EXIT_PREEMPTED
    text = log.read_text()
    stopped = re.search(r"stopped after step (\d+), which is saved", text)
    assert stopped is not None, text
    checkpoint = find(RunFolder(run))
    assert checkpoint.step == int(stopped[1]) >= 7
    assert "Traceback" not in text.split("stopped after step")[0]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_as_if_nothing_had_been(tiny_dataset: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher, which forwards it to both ranks."""
    config, log = interruptible(tiny_dataset, tmp_path, "stopped"), tmp_path / "log"
    with launched(config, 2, log) as process:
        wait_for_step(config.folder, 7, process, log)
        process.terminate()
        process.wait(timeout=30)
    stopped = re.search(r"stopped after step (\d+), which is saved", log.read_text())
    assert stopped is not None, log.read_text()
    assert find(RunFolder(config.folder)).step == int(stopped[1]) >= 7
    assert_ends_as_if_nothing_had_been(config, 2)


@pytest.mark.slow
def test_a_stop_before_the_first_step_or_during_a_save_is_as_good_as_any(tiny_dataset: Path, tmp_path: Path) -> None:
    """The moment is when a file shows it: the lock is taken before the first step, a `.tmp` is a save under way."""
    run, log = tmp_path / "stopped", tmp_path / "log"
    config = interruptible(tiny_dataset, tmp_path, run.name)
    config = changed(config, run={"checkpoint_every": 1})
    for sign in (".lock", "checkpoints/step-*.tmp"):
        with job(config, 2, log) as process:
            deadline = time.monotonic() + LIMIT_SECONDS
            while not list(run.glob(sign)):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline
            process.terminate()
            assert process.wait(timeout=30) != 0
        stopped = re.findall(r"stopped after step (\d+), which is saved", log.read_text())
        assert stopped, log.read_text()[-3000:]
        assert find(RunFolder(run)).step == int(stopped[-1])
        assert not list(run.glob("checkpoints/*.tmp"))


def test_a_second_interrupt_stops_at_once_even_a_rank_that_waits_for_another(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "stuck", tmp_path / "log"
    with job(interruptible(tiny_dataset, tmp_path, run.name), 2, log) as process:
        wait_for_step(run, 5, process, log)
        victim, asleep = process.ranks
        asleep.suspend()
        time.sleep(1)  # the victim is in a collective now, and there its Python handler never runs
        victim.send_signal(signal.SIGINT)
        time.sleep(1)
        assert victim.is_running()
        assert victim.status() != psutil.STATUS_ZOMBIE
        victim.send_signal(signal.SIGINT)
        wait_for_text(log, "stopped at once by a second interrupt", process)
        psutil.wait_procs([victim], timeout=5)
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGKILL)])
def test_no_rank_outlives_its_launcher(
    num_processes: int, number: signal.Signals, tiny_dataset: Path, tmp_path: Path
) -> None:
    """With one process the launcher hands on no signal; killed it hands on none at all. The ranks save and end."""
    run, log = tmp_path / "orphaned", tmp_path / "log"
    with launched(interruptible(tiny_dataset, tmp_path, run.name), num_processes, log) as process:
        wait_for_step(run, 5, process, log)
        orphans = ranks(process)
        process.send_signal(number)
        process.wait()
        _, alive = psutil.wait_procs(orphans, timeout=30)
        assert not alive
    stopped = re.search(r"stopped after step (\d+), which is saved", log.read_text())
    assert stopped is not None, log.read_text()
    assert find(RunFolder(run)).step == int(stopped[1]) >= 5
    assert not (run / ".lock").exists()


@pytest.mark.slow
def test_the_launcher_restarts_a_run_that_lost_a_rank_and_names_the_loss_that_ends_it(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """`--max_restarts 1`: after the first kill nobody starts anything by hand, after the second the job is over."""
    config, log = interruptible(tiny_dataset, tmp_path, "torn"), tmp_path / "log"
    with launched(config, 2, log, "--max_restarts", "1") as process:
        wait_for_step(config.folder, 7, process, log)
        ranks(process)[0].kill()
        wait_for_text(log, "going on from", process)
        wait_for_step(config.folder, last_step(config.folder) + 7, process, log)
        victims = ranks(process)
        victims[1].kill()
        assert process.wait(timeout=LIMIT_SECONDS) != 0
        assert not any(victim.is_running() for victim in victims)
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", log.read_text()), log.read_text()[-3000:]
    assert_ends_as_if_nothing_had_been(config, 2)


def test_a_second_launch_on_the_same_run_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "busy", tmp_path / "log"
    config = interruptible(tiny_dataset, tmp_path, run.name)
    with job(config, 1, log) as process:
        wait_for_step(run, 5, process, log)
        second = launch(TRAIN, flags(config))
        assert process.poll() is None
    assert second.returncode != 0
    assert re.search(r"error: .*busy: is being written by process \d+ on ", second.stderr)


def test_a_run_whose_lock_was_taken_over_saves_no_more_and_leaves_the_lock(tiny_dataset: Path, tmp_path: Path) -> None:
    """As after somebody deleted the lock of a living run and started another one."""
    run, log = tmp_path / "taken", tmp_path / "log"
    with job(interruptible(tiny_dataset, tmp_path, run.name), 2, log) as process:
        wait_for_step(run, 12, process, log)
        taken = run / "taken"
        taken.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "0 of another boot"}))
        taken.replace(run / ".lock")
        assert process.wait(LIMIT_SECONDS) == EXIT_FAILED, log.read_text()[-3000:]
    failed = re.search(
        r"must not be saved, rank 0: .*taken over .*; the last good checkpoint is step (\d+)", log.read_text()
    )
    assert failed is not None, log.read_text()
    assert find(RunFolder(run)).step == int(failed[1])
    assert "elsewhere" in (run / ".lock").read_text()


def test_a_changed_hyper_parameter_is_refused_with_a_diff(tiny_dataset: Path, tmp_path: Path) -> None:
    config = changed(interruptible(tiny_dataset, tmp_path, "changed"), training={"steps": 3})
    assert launch(TRAIN, flags(config)).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "changed").rglob("*") if path.is_file()}
    result = launch(TRAIN, flags(changed(config, training={"clip_value": 0.02})))
    assert result.returncode != 0
    assert "holds a run with other settings (training.clip_value is 0.01 there and 0.02 here)" in result.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "changed").rglob("*") if path.is_file()}


def test_divergence_stops_all_ranks_with_the_step_and_keeps_the_last_good_checkpoint(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """Without clipping, a learning rate of 1e30 overflows float32 in a few steps."""
    config = interruptible(tiny_dataset, tmp_path, "mad")
    critic_optimizer = OptimizerConfig(learning_rate=1e12)
    mad = {"objective": "lsgan", "clip_value": None, "critic_optimizer": critic_optimizer}
    result = launch(TRAIN, flags(changed(config, training=mad, run={"checkpoint_every": 1})), 2)
    assert result.returncode != 0
    assert re.search(r"error: step \d+: (the loss is not finite|must not be saved)", result.stderr), result.stderr
    checkpoint, damaged = newest_intact(RunFolder(tmp_path / "mad"))
    assert damaged == []
    if checkpoint is not None:
        assert all(tensor.isfinite().all() for tensor in checkpoint.tensors().values())
        assert f"the last good checkpoint is step {checkpoint.step}" in result.stderr


def test_a_damaged_shard_stops_the_job_and_is_named_by_the_rank_that_met_it(tiny_dataset: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, dataset)
    shard = sorted(dataset.glob("train-*.tar"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = changed(interruptible(dataset, tmp_path, "damaged"), data={"source": "streaming", "workers": 0})
    result = launch(TRAIN, flags(config), 2)
    assert result.returncode != 0
    assert re.search(rf"\[rank \d\] error: .*{shard.name}", result.stderr), result.stderr[-3000:]


@pytest.mark.slow
def test_what_a_fault_of_one_rank_changed_is_never_committed(tiny_dataset: Path, tmp_path: Path) -> None:
    config = interruptible(tiny_dataset, tmp_path, "faulty", steps=8)
    result = launch(ROOT / "tests/distributed/drift.py", flags(changed(config, run={"checkpoint_every": 1})), 2)
    assert result.returncode == 0, result.stderr[-3000:]
    images = r"rank 1: the training images in the memory of cpu are not those that were read; is it faulty\?"
    found = {
        "weight": r"generator\.dense\.weight differs between rank 0 and rank 1",
        "average": r"ema\.dense\.bias differs between rank 0 and rank 1",
        "moment": r"critic_optimizer\.score\.weight\.square_avg differs between rank 0 and rank 1",
        # The weight itself may round to the same.
        "gradient": r"generator(_optimizer)?\.dense\.weight\S* differs between rank 0 and rank 1",
        "images": images,
        "labels": images,
    }
    assert found.keys() == FAULTS.keys()
    for fault, reason in found.items():
        good = 3 if fault == "gradient" else 2
        line = rf"^{fault}: step \d: must not be saved, {reason}; the last good checkpoint is step {good}$"
        assert re.search(line, result.stdout, re.MULTILINE), (fault, result.stdout)
        assert find(RunFolder(tmp_path / fault)).step == good


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB that can be filled and emptied."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    junk = disk / "junk"
    with junk.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return junk


def wait_for_text(log: Path, pattern: str, running: Running) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not re.search(pattern, log.read_text()):
        assert running.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


@contextmanager
def job_on(disk: Path, dataset: Path, log: Path, max_save_failures: int) -> Iterator[Job]:
    """An endless job of two ranks that has committed checkpoints on the disk, and logs to TensorBoard there too."""
    full = {"keep_last": 2, "trackers": ["tensorboard"], "max_save_failures": max_save_failures}
    with job(changed(interruptible(dataset, disk, "full"), run=full), 2, log) as process:
        wait_for_step(disk / "full", 12, process, log)
        yield process


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    small_disk: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run, log = small_disk / "full", tmp_path / "log"
    with job_on(small_disk, tiny_dataset, log, 1000000) as process:
        junk = fill(small_disk)
        wait_for_text(log, r"checkpoint failed \(2 in a row, 1000000 tolerated\): .*No space left", process)
        intact, damaged = newest_intact(RunFolder(run))
        assert intact is not None
        assert damaged == []
        junk.unlink()
        deadline = time.monotonic() + LIMIT_SECONDS
        while (now := newest_intact(RunFolder(run))[0]) is None or now.step <= intact.step:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
def test_a_disk_that_stays_full_stops_the_run_after_the_tolerated_failures(
    small_disk: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run, log = small_disk / "full", tmp_path / "log"
    with job_on(small_disk, tiny_dataset, log, 2) as process:
        fill(small_disk)
        assert process.wait(timeout=60) != 0
    intact, damaged = newest_intact(RunFolder(run))
    assert intact is not None
    assert damaged == []
    failure = re.search(
        r"error: checkpoints can't be written: .*; the last good checkpoint is step (\d+)", log.read_text()
    )
    assert failure is not None, log.read_text()[-3000:]
    assert int(failure[1]) == intact.step
    assert "[rank0]: Traceback" not in log.read_text()
