"""A Slurm of two nodes on this machine: Debian's munged, slurmctld and two slurmd, in a folder of their own.

Each node has its own host name (a UTS namespace) and its own /etc/hosts (a mount namespace), so that jobs find their
nodes by name as on a real cluster. Nothing outlives `stop`: not a process of either node, nor a mount or cgroup.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = tuple(f"node{number}-of-{os.getpid()}" for number in (1, 2))
"""Names of this process's own: slurmd's control groups have them, and would be shared with another cluster here."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "unshare")
FREEZER = Path("/sys/fs/cgroup/freezer")
START_SECONDS = 60


def why_impossible() -> str | None:
    """Why this machine can't have a cluster, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)"
    if os.getuid() != 0:
        return "slurmd needs root"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "namespaces are forbidden here"
    return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def until(condition: Callable[[], bool], what: str, seconds: float, seen: Callable[[], str] = str) -> None:
    """Waits for it; fails after `seconds` with what `seen` tells then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s: {what}\n{seen()}"
        time.sleep(0.5)  # to ask Slurm takes 20 ms of a core


class Cluster:
    """Runs from construction until `stop`."""

    def __init__(self) -> None:
        # Not under pytest's folder: munged refuses a socket that other users could not reach.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))
        self.folder.chmod(0o755)
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._configure()
            munge = self.folder / "munge"
            options = {"key-file": "key", "socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
            self._start("munged", "--foreground", *(f"--{name}={munge / file}" for name, file in options.items()))
            until((munge / "socket").exists, "munged", START_SECONDS, self.logs)
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        host, (controller, *ports) = socket.gethostname(), free_ports(1 + len(NODES))
        for name in ("munge", "state", "devices", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for number in range(2):  # two GPUs a node, as far as Slurm can see
            os.mknod(self.folder / f"devices/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/devices/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        # A process tracker that signals like production's where the kernel still has its controller.
        tracker = "cgroup" if os.access(FREEZER, os.W_OK) else "pgid"
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            # Requeueing waits for old credentials to expire: two minutes by default.
            f"AuthInfo=socket={self.folder}/munge/socket,cred_expire=5",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"ProctrackType=proctrack/{tracker}",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerParameters=sched_interval=2,bf_interval=2",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "SlurmdTimeout=10",
            "MinJobAge=86400",  # tests ask for jobs that ended long before them
            "KillWait=3",
            "GresTypes=gpu",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=9999 Gres=gpu:2"
                for node, port in zip(NODES, ports, strict=True)
            ),
            f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=60",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def logs(self) -> str:
        return (self.folder / "daemons.log").read_text()[-3000:]

    def run(self, *command: str, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """The output of one of Slurm's commands, or of a script that uses them."""
        result = subprocess.run(
            command, cwd=folder, env=self.environment | (environment or {}), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, f"{command}: {result.stderr}{self.logs()}"
        return result.stdout.strip()

    def start_node(self, node: str) -> None:
        script = 'mount --bind "$2" /etc/hosts && hostname "$1" && exec slurmd -D -N "$1"'
        hosts = str(self.folder / "hosts")
        self._slurmd[node] = self._start("unshare", "--uts", "--mount", "sh", "-c", script, "sh", node, hosts)
        ready = ("idle", "mixed", "allocated")
        until(lambda: self._state(node) in ready, f"{node} to be ready", START_SECONDS, self.logs)

    def _state(self, node: str) -> str:
        command = ["sinfo", "--noheader", "--nodes", node, "--format", "%T"]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def processes(self, node: str) -> list[psutil.Process]:
        """Everything that runs on a node: its slurmd, the steps and the jobs' processes."""
        slurmd = self._slurmd.get(node)
        own = slurmd and _host_namespace(slurmd.pid)
        if own is None or own == _host_namespace(os.getpid()):
            return []
        return [process for process in psutil.process_iter() if _host_namespace(process.pid) == own]

    def kill_node(self, node: str) -> None:
        """As a power cut would: all at once, without a word."""
        doomed = self.processes(node)
        for process in doomed:
            process.send_signal(signal.SIGSTOP)  # none may tell of another's end
        for process in doomed:
            process.kill()
        psutil.wait_procs(doomed, timeout=10)

    def stop(self) -> None:
        doomed = [psutil.Process(daemon.pid) for daemon in self._daemons if daemon.poll() is None]
        doomed += [process for node in NODES for process in self.processes(node)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(doomed, timeout=10)
        for daemon in self._daemons:
            daemon.wait()
        for node in NODES:
            for path in sorted(FREEZER.glob(f"slurm_{node}/**/"), reverse=True):
                path.rmdir()
        shutil.rmtree(self.folder)


def _host_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/uts").readlink())
    except OSError:
        return None
