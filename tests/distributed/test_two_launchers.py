"""Two machines without Slurm: a launcher on each, here both on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.jobs import ROOT, TIMEOUT_SECONDS, environment, final_state, flags, launch, tiny_config


def launch_on_two(arguments: list[str]) -> None:
    """The README's command for several machines, two ranks on each."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
    settings = [
        *("--config_file", str(ROOT / "launch/accelerate/nodes.yaml"), "--num_machines", "2", "--num_processes", "4"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
    ]
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", *settings, "--machine_rank", str(machine)),
                *(str(ROOT / "pipeline/train.py"), *arguments),
            ],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in range(2)
    ]
    try:
        errors = [launcher.communicate(timeout=TIMEOUT_SECONDS)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    assert [launcher.returncode for launcher in launchers] == [0, 0], "".join(errors)[-4000:]


@pytest.mark.slow
def test_two_launchers_train_as_one_and_one_goes_on_from_them(tiny_dataset: Path, tmp_path: Path) -> None:
    """Bit for bit at the same world size: however the ranks are spread, and across a stop. Four ranks, because the sum
    of two floats does not depend on its order."""

    def arguments(name: str, steps: int) -> list[str]:
        place = {"root": str(tmp_path), "name": name}
        training = {"steps": steps, "n_critic": 2}
        return flags(tiny_config(run=place, data={"dataset": str(tiny_dataset)}, training=training))

    launch_on_two(arguments("spread", 4))
    manifest = json.loads((tmp_path / "spread/checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["world_size"] == 4
    for name in ("spread", "whole"):
        result = launch(ROOT / "pipeline/train.py", arguments(name, 8), 4)
        assert result.returncode == 0, result.stderr[-4000:]
        assert ("going on from" in result.stderr) == (name == "spread")
    spread, whole = (final_state(tmp_path / name, 8) for name in ("spread", "whole"))
    assert spread.keys() == whole.keys()
    assert [name for name in spread if not torch.equal(spread[name], whole[name])] == []
