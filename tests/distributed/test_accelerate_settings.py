"""What a file that `accelerate config` has left does to a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config import RuntimeConfig
from pipeline.distributed import launcher
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from tests.jobs import ROOT, TIMEOUT_SECONDS, environment, final_state, flags, launch, restoring_process, tiny_config

TRAIN = ROOT / "pipeline/train.py"
ASKS = "accelerate's configuration asks for"
WRITTEN = {
    **{"compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "NO", "downcast_bf16": "no"},
    **{"enable_cpu_affinity": False, "machine_rank": 0, "main_training_function": "main", "mixed_precision": "no"},
    **{"num_machines": 1, "num_processes": 1, "rdzv_backend": "static", "same_network": True, "tpu_env": []},
    **{"tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": True},
}
"""What `accelerate config` of 1.15 writes for one process on a CPU."""
DYNAMO = {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default", "dynamo_use_dynamic": False}
FSDP = {
    **{"fsdp_activation_checkpointing": False, "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"},
    **{"fsdp_cpu_ram_efficient_loading": True, "fsdp_min_num_params": 100_000_000, "fsdp_offload_params": False},
    **{"fsdp_reshard_after_forward": True, "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_version": 2},
}


def launch_with(home: Path, settings: Mapping[str, object], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Trains with the launcher, under a home of Hugging Face's that holds a default file of these settings."""
    file = home / "accelerate/default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump({**WRITTEN, **settings}))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launcher, str(TRAIN), *arguments]
    variables = environment() | {"HF_HOME": str(home)}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def arguments_of(root: Path, dataset: Path, name: str = "run") -> list[str]:
    place = {"root": str(root), "name": name}
    return flags(tiny_config(run=place, data={"dataset": str(dataset)}, training={"steps": 2}))


@pytest.mark.slow
def test_what_would_change_a_runs_numbers_is_told_and_not_done(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {"mixed_precision": "bf16", "dynamo_config": DYNAMO}
    result = launch_with(tmp_path / "home", settings, arguments_of(tmp_path, tiny_dataset, "launched"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line for line in result.stderr.splitlines() if "accelerate" in line] == [
        f"{ASKS} mixed_precision bf16: not used here, set runtime.precision (it is float32)",
        f"{ASKS} dynamo_backend INDUCTOR: not used here, networks are not compiled",
    ]
    assert launch(TRAIN, arguments_of(tmp_path, tiny_dataset, "plain")).returncode == 0
    launched, plain = (final_state(tmp_path / name, 2) for name in ("launched", "plain"))
    assert launched.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(launched[name], plain[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"distributed_type": "MULTI_CPU", "num_processes": 2},
            "error: the launcher was asked for num_processes 2 but started 1: start with --multi_gpu (on CPUs too)",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": FSDP, "use_cpu": False},
            f"error: {ASKS} FSDP (ACCELERATE_USE_FSDP), but each rank needs a whole network: ",
        ),
    ],
    ids=["MULTI_CPU", "FSDP"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, object], message: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    result = launch_with(tmp_path / "home", settings, arguments_of(runs, tiny_dataset))
    assert result.returncode == 1  # the launcher's, with its traceback or page below the line
    error = next(line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert error.startswith(message)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("variable", "what"),
    [
        (
            "ACCELERATE_USE_DEEPSPEED",
            "DeepSpeed (ACCELERATE_USE_DEEPSPEED), but each rank needs a whole network",
        ),
        (
            "ACCELERATE_USE_MEGATRON_LM",
            "Megatron-LM (ACCELERATE_USE_MEGATRON_LM), but",
        ),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config (ACCELERATE_USE_PARALLELISM_CONFIG), but"),
    ],
)
def test_libraries_that_divide_a_network_are_refused_in_a_line(
    variable: str, what: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """By what their launchers, which take the libraries, put into the environment."""
    result = launch(TRAIN, arguments_of(tmp_path, tiny_dataset), variables={variable: "true"})
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {ASKS} {what}")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_processes_of_mpirun_are_no_ranks(tiny_dataset: Path, tmp_path: Path) -> None:
    """accelerate's MULTI_CPU with an mpirun_config starts such."""
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    result = launch(TRAIN, arguments_of(tmp_path, tiny_dataset), variables=variables)
    assert result.returncode == 2
    assert "error: the launcher was asked for num_processes 2 but started 1: start with" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--num_processes", "0", "train.py"], 0),
        (["--cpu", "--num-processes=2", "train.py"], 2),
        (["--config_file", "FILE", "train.py"], 3),
        (["--config_file", "FILE", "--num_processes", "4", "train.py"], 4),
        (["--config_file", "FILE", "--num_processes", "1", "train.py", "--num_processes", "5"], None),
    ],
)
def test_another_number_of_processes_than_asked_for_is_refused(
    arguments: list[str], asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the launcher's command line or its file; what follows the script is the script's."""
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(WRITTEN | {"distributed_type": "MULTI_CPU", "num_processes": 3}))
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    monkeypatch.setattr(launcher, "launch_arguments", lambda: given)
    with restoring_process():
        if asked is None:
            Runtime(RuntimeConfig(device="cpu", threads=1)).close()
        else:
            with pytest.raises(UserError, match=f"was asked for num_processes {asked} but started 1: "):
                Runtime(RuntimeConfig(device="cpu", threads=1))
