"""The manifest for Kubeflow's training operator: its fields, and its command with the environment of such a job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, flags, tiny_config

MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "launch/kubernetes/train.yaml").read_text())
CONTAINER: dict[str, Any] = MANIFEST["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
RUN_POLICY = {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend"}
RUN_POLICY |= {"ttlSecondsAfterFinished"}


def test_fields_are_those_of_kubeflow_org_v1() -> None:
    """From the API's reference (PyTorchJob, PyTorchJobSpec, RunPolicy, ReplicaSpec) and Kubernetes's (PodSpec)."""
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert MANIFEST.keys() == {"apiVersion", "kind", "metadata", "spec"}
    spec = MANIFEST["spec"]
    assert spec.keys() <= {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
    assert spec["runPolicy"].keys() <= RUN_POLICY
    assert spec["runPolicy"]["cleanPodPolicy"] in {"All", "Running", "None"}
    assert spec["pytorchReplicaSpecs"].keys() == {"Master", "Worker"}
    for replica in spec["pytorchReplicaSpecs"].values():
        assert replica.keys() == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] == "ExitCode"  # 1 to 127 end the job, 128 to 255 start the pod again
        pod = replica["template"]["spec"]
        assert pod.keys() == {"containers", "terminationGracePeriodSeconds", "volumes"}
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container.keys() == {
            *("name", "image", "workingDir", "command", "args", "env", "resources", "volumeMounts")
        }
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
        assert "persistentVolumeClaim" in mounts[container["workingDir"]]


def pod(rank: int, port: int, folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts the container's command as the operator would, with `program` for gan-pipeline."""
    shim = folder / "bin" / "gan-pipeline"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f"#!/bin/sh\n{program}\n")
    shim.chmod(0o755)
    script, name, *_ = CONTAINER["args"]
    variables = {
        **{"PYTHONUNBUFFERED": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank},
        **{"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NNODES": 2, "PET_NODE_RANK": rank},
        **{"PET_NPROC_PER_NODE": "auto", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT},
        **{entry["name"]: entry["value"] for entry in CONTAINER["env"]},
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [*CONTAINER["command"], script, name, *arguments],
        cwd=folder,
        env=os.environ | {key: str(value) for key, value in variables.items()},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (2, 2), (3, 3), (75, 143), (1, 143), (137, 143)])
def test_the_operator_sees_whether_to_start_a_pod_again(code: int, seen: int, tmp_path: Path) -> None:
    with pod(0, 1, tmp_path, f'[ "$*" = "train --a b" ] && exit {code}', "--a", "b") as process:
        assert process.wait() == seen


@pytest.mark.slow
def test_two_pods_stop_together_after_saving(digits: Dataset, tmp_path: Path) -> None:
    """Rank 1's is drained: SIGTERM to the first process of its container."""
    config: Config = tiny_config(
        data={"dataset": str(digits.folder)},
        run={"root": str(tmp_path), "name": "job", "checkpoint_every": 1},
        training={"batch_size": 8, "n_critic": 1, "steps": 1_000_000},
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = f'exec {sys.executable} -m pipeline "$@"'
    pods = [pod(rank, port, tmp_path, program, *flags(config)) for rank in range(2)]
    run, deadline = RunFolder(tmp_path / "job"), time.monotonic() + 300
    try:
        while not run.saved_steps():
            assert time.monotonic() < deadline
            assert [process.poll() for process in pods] == [None, None], pods[0].communicate()
            time.sleep(0.05)
        pods[1].send_signal(signal.SIGTERM)
        messages = [process.communicate(timeout=300)[1] for process in pods]
    finally:
        for process in pods:
            process.kill()
    assert [process.returncode for process in pods] == [143, 143], messages
    assert "which is saved: the same command goes on from there" in messages[0]
    assert f"stopped after step {run.saved_steps()[-1]}," in messages[0]
