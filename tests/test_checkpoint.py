"""The commit protocol and what it must survive. Real files, real damage, a real full disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    IntegrityError,
    committed,
    find,
    newest_intact,
    read_checkpoint,
    sweep,
)
from tests.jobs import ROOT
from tests.trap import Trap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def random_state(seed: int, scale: float = 0.01) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "critic.weight": (torch.rand(40, 3, 5, 5, generator=random) * 2 - 1) * scale,
        "critic_optimizer.weight.step": torch.tensor(float(seed)),
        "generator.weight": torch.randn(30, 20, 5, 5, generator=random).contiguous(memory_format=torch.channels_last),
        "generator.count": torch.tensor(seed),
        "generator.half": torch.randn(7, generator=random, dtype=torch.float64),
    }


def writer(folder: Path, keep_last: int = 3, keep_every: int | None = None) -> CheckpointWriter:
    return CheckpointWriter(
        folder, rank=0, world_size=1, keep_last=keep_last, keep_every=keep_every, clip_value=0.01
    )  # fmt: skip


def save_steps(folder: Path, *steps: int, **options: int) -> None:
    out = writer(folder, **options)
    for step in steps:
        out.save(random_state(step), step, {"elapsed_seconds": step / 2})
    out.finish()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_saved_is_loaded_bit_for_bit(seed: int, tmp_path: Path) -> None:
    out = writer(tmp_path)
    state = random_state(seed)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    out.save(state, 7, {"elapsed_seconds": 1.5})
    for tensor in state.values():
        tensor.zero_()  # training goes on while the thread writes
    out.finish()
    checkpoint, damaged = newest_intact(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.world_size, checkpoint.progress, damaged) == (
        7,
        1,
        {"elapsed_seconds": 1.5},
        [],
    )
    tensors = checkpoint.tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_retention(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(10, 110, 10), keep_last=2, keep_every=40)
    assert [path.name for path in committed(tmp_path)] == [
        "step-00000040",
        "step-00000080",
        "step-00000090",
        "step-00000100",
    ]
    assert not list(tmp_path.glob("*.tmp"))


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
    folder = tmp_path_factory.mktemp("damage")
    save_steps(folder, 1, 2)
    newest = committed(folder)[-1]
    victim = newest / "manifest.json" if of_manifest else next(newest.glob("*.safetensors"))
    DAMAGE[kind](victim, position)
    if of_manifest and kind == "grown":
        return  # a byte after the manifest's last brace makes it invalid JSON unless it is white space; see below
    checkpoint, damaged = newest_intact(folder)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(damaged) == 1
    assert str(victim) in damaged[0]


def test_without_an_intact_checkpoint_the_reasons_are_given(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 1, 2)
    for folder in committed(tmp_path / "checkpoints"):
        next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"holds no intact checkpoint; .*step-00000002.*; .*step-00000001"):
        find(tmp_path)


def test_uncommitted_saves_are_never_seen_and_swept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002.tmp")
    assert newest_intact(tmp_path) == (None, [])
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip(next((tmp_path / "step-00000002").glob("*.safetensors")), 2000)
    save_steps(tmp_path, 2)
    checkpoint, damaged = newest_intact(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, damaged) == (2, [])


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_executed(name: str, tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    folder, proof = tmp_path / "step-00000001", tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Trap(proof)))
    checkpoint, damaged = newest_intact(tmp_path)
    assert checkpoint is None
    assert name in damaged[0]
    with pytest.raises(CheckpointError):
        read_checkpoint(folder).tensors()
    assert not proof.exists()
    pickle.loads((folder / name).read_bytes())
    assert proof.exists(), "the trap works where it is unpickled"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("critic.weight", 0.5, "critic.weight reaches 0.5, beyond the clip value 0.01"),
        ("generator.weight", float("nan"), "generator.weight holds a number that is not finite"),
        ("generator.half", float("inf"), "generator.half holds a number that is not finite"),
    ],
)
def test_a_state_that_broke_its_invariants_is_never_committed(
    name: str, value: float, message: str, tmp_path: Path
) -> None:
    out = writer(tmp_path)
    out.save(random_state(1), 1, {})
    state = random_state(2)
    state[name].view(-1)[3:4].fill_(value) if state[name].is_contiguous() else state[name][0, 0].fill_(value)
    out.save(state, 2, {})
    with pytest.raises(IntegrityError, match=message):
        out.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert out.committed_step == 1


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
    out = writer(small_disk, keep_last=9)
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
    steps = [read_checkpoint(folder).step for folder in committed(small_disk)]
    assert steps == list(range(1, len(steps) + 1))
    for folder in committed(small_disk):
        read_checkpoint(folder).verify()
    assert not list(small_disk.glob("*.tmp")), "a failed save frees what it took"
    junk = committed(small_disk)[0]
    subprocess.run(["rm", "-r", str(junk)], check=True)
    out.save(random_state(9), 9, {})
    out.finish()
    assert out.committed_step == 9
    assert out.failures_in_a_row == 0


def test_a_lost_folder_is_an_error_that_passes(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.write_text("a file where the folder should be")
    out = writer(folder)
    out.save(random_state(1), 1, {})
    with pytest.raises(OSError, match="gone"):
        out.finish()
    folder.unlink()
    out.save(random_state(2), 2, {})
    out.finish()
    assert out.committed_step == 2


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.checkpoint", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_the_command_lists_verifies_and_consolidates(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 1, 2, 3)
    flip(next((tmp_path / "checkpoints/step-00000002").glob("*.safetensors")), 5000)
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
    refused = command("consolidate", str(tmp_path), str(one))
    assert refused.returncode == 2
    assert refused.stderr.strip() == f"error: {one}: exists already, name another file"
    assert json.loads((tmp_path / "checkpoints/step-00000003/manifest.json").read_text())["step"] == 3
