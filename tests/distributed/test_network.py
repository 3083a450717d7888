"""Ranks on machines of their own, with a slow network between them that breaks. It takes root (see network.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.config import Config
from pipeline.storage.checkpoint import find, newest_intact
from pipeline.storage.run_folder import RunFolder
from tests.distributed.interrupting import LIMIT_SECONDS, assert_same_end, interruptible, wait_for_step
from tests.distributed.network import Network
from tests.jobs import ROOT, changed, flags, launch, tiny_config
from tests.ranks import Job

IN_NAMESPACE, TRAIN = ROOT / "tests/distributed/in_namespace.py", ROOT / "pipeline/train.py"
STEPS = 12
pytestmark = pytest.mark.slow


@contextmanager
def network() -> Iterator[Network]:
    """Two machines, 100 Mb/s and 10 ms each way."""
    try:
        made = Network(2, megabits=100, delay_seconds=0.01).__enter__()
    except PermissionError as error:
        pytest.skip(f"needs the right to make network namespaces and TUN devices: {error}")
    try:
        yield made
    finally:
        made.__exit__()


def arguments(machines: Network, config: Config, ranks_a_machine: int) -> list[str]:
    return [",".join(machines.names), str(ranks_a_machine), str(TRAIN), *flags(config)]


@pytest.fixture(scope="module")
def whole(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run on this machine alone, of two ranks and of four."""
    root = tmp_path_factory.mktemp("whole")
    for world_size in (2, 4):
        result = launch(TRAIN, flags(interruptible(tiny_dataset, root, str(world_size), STEPS)), world_size)
        assert result.returncode == 0, result.stderr[-3000:]
    return {world_size: root / str(world_size) for world_size in (2, 4)}


def test_two_machines_of_two_ranks_train_as_one_machine(
    whole: dict[int, Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    config = interruptible(tiny_dataset, tmp_path, "far", STEPS)
    with network() as machines:
        result = launch(IN_NAMESPACE, arguments(machines, config, 2), 4)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_end(whole[4], tmp_path / "far", STEPS)


def test_a_partition_ends_all_ranks_names_who_is_missed_and_the_run_goes_on(
    whole: dict[int, Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "cut", tmp_path / "log"
    config = changed(interruptible(tiny_dataset, tmp_path, run.name, STEPS), runtime={"timeout_seconds": 10})
    with network() as machines:
        endless = changed(config, training={"steps": 100_000})
        job = Job(IN_NAMESPACE, arguments(machines, endless, 1), 2, stdout=log, stderr=log)
        with job:
            wait_for_step(run, 6, job, log)
            machines.cut(1)
            _, alive = psutil.wait_procs(job.ranks, LIMIT_SECONDS)
            assert not alive
            assert job.wait() == 1
        text = log.read_text()
        assert "Traceback" not in text, text
        assert re.search(r"^error: pipeline/.*: rank 1 did not come within 0:00:10", text, re.MULTILINE), text
        saved = newest_intact(RunFolder(run))[0]
        assert saved is not None
        assert saved.step < STEPS
        machines.mend()
        result = launch(IN_NAMESPACE, arguments(machines, config, 1), 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"going on from {find(RunFolder(run), saved.step).folder}" in result.stderr
    assert_same_end(whole[2], run, STEPS)


def test_ranks_that_meet_but_do_not_reach_each_other_say_so_at_the_limit(tmp_path: Path) -> None:
    """Each offers the others the address of its own loopback device, as a machine does whose name stands beside
    127.0.1.1 in /etc/hosts."""
    config = tiny_config(run={"root": str(tmp_path)}, runtime={"timeout_seconds": 3})
    with network() as machines:
        result = launch(IN_NAMESPACE, arguments(machines, config, 1), 2, variables={"GLOO_SOCKET_IFNAME": "lo"})
    assert result.returncode == 2
    line = (
        r"\[rank \d\] error: the ranks have met but do not reach each other within runtime.timeout_seconds 3 \(.+\); "
    )
    lines = result.stderr.splitlines()
    assert 1 <= len(lines) <= 2, result.stderr
    assert all(re.match(line + "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME must name", told) for told in lines), lines
    assert not list(tmp_path.iterdir())


def test_a_first_machine_that_does_not_answer_is_a_line_of_each_rank_at_the_limit(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)}, runtime={"timeout_seconds": 2})
    with network() as machines:
        machines.cut(0)
        result = launch(IN_NAMESPACE, arguments(machines, config, 1), 2)
    assert result.returncode == 2
    line = r"\[rank {}\] error: the ranks did not meet at 10.77.0.1:\d+ within runtime.timeout_seconds 2 \({}\); .*"
    lines = sorted(result.stderr.splitlines())
    assert re.fullmatch(line.format(0, r"rank 1 of 2 did not come"), lines[0]), result.stderr
    assert re.fullmatch(line.format(1, "timed out"), lines[1]), result.stderr
    assert len(lines) == 2
    assert not list(tmp_path.iterdir())
