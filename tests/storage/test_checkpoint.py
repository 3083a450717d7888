"""The commit protocol and what it must survive. Real files, real damage, a real full disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.distributed.collectives import Ranks
from pipeline.storage.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    IntegrityError,
    committed,
    find,
    newest_intact,
    read_checkpoint,
    sweep,
)
from pipeline.storage.run_folder import RunFolder, step_of
from tests.jobs import ROOT, launch
from tests.storage.many_saves import held_after
from tests.trap import Trap

T = TypeVar("T")


def random_state(seed: int, scale: float = 0.01) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "critic.weight": (torch.rand(40, 3, 5, 5, generator=random) * 2 - 1) * scale,
        "critic_optimizer.weight.step": torch.tensor(float(seed)),
        "generator.weight": torch.randn(30, 20, 5, 5, generator=random).contiguous(memory_format=torch.channels_last),
        "generator.count": torch.tensor(seed),
        "generator.half": torch.randn(7, generator=random, dtype=torch.float64),
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return made(tmp_path / "run")


def made(path: Path) -> RunFolder:
    path.mkdir(exist_ok=True)
    (path / "config.yaml").touch()
    return RunFolder(path)


def writer(run: RunFolder, keep_last: int = 3, keep_every: int | None = None) -> CheckpointWriter:
    return CheckpointWriter(run, Ranks(), keep_last=keep_last, keep_every=keep_every, bounds={"critic.weight": 0.01})


def save_steps(run: RunFolder, *steps: int, **options: int) -> None:
    out = writer(run, **options)
    for step in steps:
        out.save(random_state(step), step, {"elapsed_seconds": step / 2})
    out.finish()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_saved_is_loaded_bit_for_bit(seed: int, run: RunFolder) -> None:
    out = writer(run)
    state = random_state(seed)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    out.save(state, 7, {"elapsed_seconds": 1.5})
    for tensor in state.values():
        tensor.zero_()  # training goes on while the thread writes
    out.finish()
    checkpoint, damaged = newest_intact(run)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.world_size, damaged) == (7, 1, [])
    assert checkpoint.progress == {"elapsed_seconds": 1.5}
    check_equal(checkpoint.tensors(), expected)


def check_equal(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_retention(run: RunFolder) -> None:
    save_steps(run, *range(10, 110, 10), keep_last=2, keep_every=40)
    assert [path.name for path in committed(run)] == [
        "step-00000040",
        "step-00000080",
        "step-00000090",
        "step-00000100",
    ]
    assert not list(run.checkpoints.glob("*.tmp"))


def test_the_best_is_kept_until_a_better_one_is_there(run: RunFolder) -> None:
    scores = {10: 5, 20: 3, 30: 4, 40: 4, 50: 2, 60: 6, 70: 6}
    out = CheckpointWriter(
        run,
        Ranks(),
        keep_last=1,
        keep_every=None,
        best_of=lambda steps: min(steps, key=lambda step: (scores[step], step)),
    )
    kept = {10: [10], 20: [20], 30: [20, 30], 40: [20, 40], 50: [50], 60: [50, 60], 70: [50, 70]}
    for step, expected in kept.items():
        out.save(random_state(step), step, {})
        out.finish()
        assert [step_of(folder) for folder in committed(run)] == expected


def test_a_damaged_newer_checkpoint_takes_nobodys_place(run: RunFolder) -> None:
    save_steps(run, 10, 30, keep_last=2)
    (run.checkpoint(30) / "manifest.json").write_text("{")
    save_steps(run, 11, 12, keep_last=1)
    newest, damaged = newest_intact(run)
    assert newest is not None
    assert newest.step == 12
    assert len(damaged) == 1


def test_a_step_of_nine_digits_is_the_newest(run: RunFolder) -> None:
    save_steps(run, 99_999_999, 100_000_000)
    assert [read_checkpoint(folder).step for folder in committed(run)] == [99_999_999, 100_000_000]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, int], object]] = {
    "flipped bit": flip,
    "truncated": lambda path, position: os.truncate(path, position % path.stat().st_size),
    "deleted": lambda path, _: path.unlink(),
    "grown": lambda path, _: path.write_bytes(path.read_bytes() + b"x"),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(DAMAGE)), position=st.integers(0, 10**6), of_manifest=st.booleans())
def test_any_damage_is_found_and_the_checkpoint_before_is_used(
    kind: str, position: int, of_manifest: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = made(tmp_path_factory.mktemp("damage"))
    save_steps(run, 1, 2)
    newest = committed(run)[-1]
    victim = newest / "manifest.json" if of_manifest else next(newest.glob("*.safetensors"))
    DAMAGE[kind](victim, position)
    if of_manifest and kind == "grown":
        return  # a byte after the manifest's last brace makes it invalid JSON unless it is white space; see below
    checkpoint, damaged = newest_intact(run)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(damaged) == 1
    assert str(victim) in damaged[0]


def test_without_an_intact_checkpoint_the_reasons_are_given(run: RunFolder) -> None:
    save_steps(run, 1, 2)
    for folder in committed(run):
        next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"holds no intact checkpoint; .*step-00000002.*; .*step-00000001"):
        find(run)


def test_a_step_that_is_not_there_is_told_with_those_that_are(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"run: holds no checkpoint, one would be in .*run/checkpoints: train it"):
        find(run)
    save_steps(run, 5, 100)
    with pytest.raises(CheckpointError, match=r"run: holds no checkpoint of step 7: it has 5, 100$"):
        find(run, 7)


def test_uncommitted_saves_are_never_seen_and_swept(run: RunFolder) -> None:
    sweep(run)  # of a run that has not begun
    save_steps(run, 1)
    run.checkpoint(1).rename(run.checkpoint(2).with_suffix(".tmp"))
    assert newest_intact(run) == (None, [])
    sweep(run)
    assert not list(run.checkpoints.iterdir())


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(run: RunFolder) -> None:
    save_steps(run, 1, 2)
    flip(next(run.checkpoint(2).glob("*.safetensors")), 2000)
    save_steps(run, 2)
    checkpoint, damaged = newest_intact(run)
    assert checkpoint is not None
    assert (checkpoint.step, damaged) == (2, [])


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_executed(name: str, run: RunFolder, tmp_path: Path) -> None:
    save_steps(run, 1)
    folder, proof = run.checkpoint(1), tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Trap(proof)))
    checkpoint, damaged = newest_intact(run)
    assert checkpoint is None
    assert name in damaged[0]
    with pytest.raises(CheckpointError):
        read_checkpoint(folder).tensors()
    assert not proof.exists()
    pickle.loads((folder / name).read_bytes())
    assert proof.exists(), "the trap works where it is unpickled"


def write_by_hand(folder: Path, tensors: dict[str, Tensor], **content: Any) -> None:
    """A checkpoint as the format is documented, without the writer."""
    folder.mkdir(parents=True)
    shard = folder / "shard-00001-model-00001-of-00001.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, shard)
    entry = {"num_bytes": shard.stat().st_size, "sha256": sha256(shard.read_bytes()).hexdigest()}
    manifest = {"step": 5, "world_size": 1, "progress": {}, "files": {shard.name: entry}} | content
    digest = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def test_a_checkpoint_says_its_format_and_others_are_refused(run: RunFolder) -> None:
    save_steps(run, 1)
    assert json.loads((run.checkpoint(1) / "manifest.json").read_text())["format"] == 2
    write_by_hand(run.checkpoint(2), {}, format=3)
    with pytest.raises(CheckpointError, match=r"step-00000002.*its format is 3, this version reads 2"):
        find(run, 2)
    assert find(run).step == 1


@pytest.mark.slow
def test_a_save_that_waits_for_a_lost_rank_does_not_keep_the_process(tmp_path: Path) -> None:
    """As after an error of this rank alone: nobody else will come to the save's collectives."""
    waiting = "import sys, threading; from pathlib import Path; import torch\n"
    waiting += "from pipeline.distributed.collectives import Ranks\n"
    waiting += "from pipeline.storage.checkpoint import CheckpointWriter\n"
    waiting += "from pipeline.storage.run_folder import RunFolder\n"
    waiting += "class Lost(CheckpointWriter):\n    def _check(self, *state): threading.Event().wait()\n"
    waiting += "out = Lost(RunFolder(Path(sys.argv[1])), Ranks(), keep_last=1, keep_every=None)\n"
    waiting += "out.save({'x': torch.zeros(1)}, 1, {}); sys.exit(3)"
    assert subprocess.run([sys.executable, "-c", waiting, str(tmp_path)], cwd=ROOT, timeout=60).returncode == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("critic.weight", 0.5, "critic.weight reaches 0.5, beyond the clip value 0.01"),
        ("generator.weight", float("nan"), "generator.weight holds a number that is not finite"),
        ("generator.half", float("inf"), "generator.half holds a number that is not finite"),
    ],
)
def test_a_state_that_broke_its_invariants_is_never_committed(
    name: str, value: float, message: str, run: RunFolder
) -> None:
    out = writer(run)
    out.save(random_state(1), 1, {})
    state = random_state(2)
    state[name].view(-1)[3:4].fill_(value) if state[name].is_contiguous() else state[name][0, 0].fill_(value)
    out.save(state, 2, {})
    with pytest.raises(IntegrityError, match=message):
        out.finish()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]
    assert out.committed_step == 1


def test_only_what_is_clipped_has_a_bound(run: RunFolder) -> None:
    """A critic's buffers, such as running averages, are no weights."""
    out = writer(run)
    out.save(random_state(1) | {"critic.norm.running_var": torch.ones(3)}, 1, {})
    out.finish()
    assert out.committed_step == 1


@pytest.mark.parametrize(("odd", "message"), [(0, "rank 1 and rank 0"), (2, "rank 0 and rank 2")])
def test_of_three_ranks_the_one_that_differs_is_named(odd: int, message: str, run: RunFolder) -> None:
    @dataclass(frozen=True)
    class Three(Ranks):
        """As rank 0 sees them when rank `odd` holds other numbers."""

        def gather(self, value: T) -> list[T]:
            return [cast("T", dict(value) | {"x": "other"} if rank == odd else value) for rank in range(3)]  # type: ignore[call-overload]

    out = CheckpointWriter(run, Three(), keep_last=1, keep_every=None)
    with pytest.raises(IntegrityError, match=re.escape(f"x differs between {message}")):
        out._compare_replicas({"x": torch.zeros(3)})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB: three checkpoints of 75 kB fit, a fourth does not."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(small_disk: Path) -> None:
    run = made(small_disk)
    out = writer(run, keep_last=9)
    failures = 0
    for step in range(1, 8):
        try:
            out.save(random_state(step), step, {})
        except OSError:
            failures += 1
            out.save(random_state(step), step, {})
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        out.finish()
    assert failures >= 3
    assert out.failures_in_a_row > failures
    steps = [read_checkpoint(folder).step for folder in committed(run)]
    assert steps == list(range(1, len(steps) + 1))
    for folder in committed(run):
        read_checkpoint(folder).verify()
    assert not list(run.checkpoints.glob("*.tmp")), "a failed save frees what it took"
    junk = committed(run)[0]
    subprocess.run(["rm", "-r", str(junk)], check=True)
    out.save(random_state(9), 9, {})
    out.finish()
    assert out.committed_step == 9
    assert out.failures_in_a_row == 0


@pytest.mark.slow
def test_saves_leave_no_descriptor_no_thread_and_no_object_behind() -> None:
    """By hand, as many as one likes: `python -m tests.storage.many_saves`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # where no fsync waits for a disk
        _, before, *_, after = held_after(200, 40, Path(folder))
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    assert after.objects < before.objects + 60  # half of one a save


def test_a_lost_folder_is_an_error_that_passes(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.write_text("a file where the folder should be")
    out = writer(RunFolder(folder))
    out.save(random_state(1), 1, {})
    with pytest.raises(OSError, match="gone"):
        out.finish()
    folder.unlink()
    made(folder)
    out.save(random_state(2), 2, {})
    out.finish()
    assert out.committed_step == 2


def test_a_run_that_is_deleted_while_it_goes_on_is_not_begun_again_in_its_place(run: RunFolder) -> None:
    out = writer(run)
    out.save(random_state(1), 1, {})
    out.finish()
    shutil.rmtree(run.path)
    run.samples.mkdir(parents=True)  # by the next grid
    out.save(random_state(2), 2, {})
    with pytest.raises(OSError, match="was moved or deleted while the run was going on"):
        out.finish()
    assert not run.checkpoints.exists()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return launch("pipeline.checkpoint", arguments)


def test_the_command_lists_verifies_and_consolidates(tmp_path: Path) -> None:
    run = made(tmp_path)
    save_steps(run, 1, 2, 3)
    flip(next(run.checkpoint(2).glob("*.safetensors")), 5000)
    listed = command("list", str(tmp_path))
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [f"step-0000000{step}" for step in (1, 2, 3)]
    assert "world size 1" in listed.stdout
    verified = command("verify", str(tmp_path))
    assert verified.returncode == 2
    assert ["damaged" in line for line in verified.stdout.splitlines()] == [False, True, False]
    one = tmp_path / "one.safetensors"
    assert command("consolidate", str(tmp_path), str(one)).returncode == 0
    assert {name: tensor.tolist() for name, tensor in load_file(one).items()} == {
        name: tensor.tolist() for name, tensor in random_state(3).items()
    }
    with safe_open(one, "pt") as file:
        assert file.metadata() == {"step": "3", "orientation": "mirrored"}
    os.umask(before := os.umask(0))
    assert stat.S_IMODE(one.stat().st_mode) == 0o666 & ~before, "a group on a cluster reads it"
    refused = command("consolidate", str(tmp_path), str(one))
    assert refused.returncode == 2
    assert refused.stderr.strip() == f"error: {one}: exists already, name another file"
    assert json.loads((run.checkpoint(3) / "manifest.json").read_text())["step"] == 3
