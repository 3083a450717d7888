"""An installation without a checkout: the wheel that the sdist makes, its command, and the containers' files."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline import __version__
from pipeline.__main__ import PROGRAMS
from pipeline.errors import EXIT_PREEMPTED
from pipeline.storage.checkpoint import find
from pipeline.storage.run_folder import RunFolder
from tests.distributed.interrupting import interruptible, wait_for_step
from tests.jobs import ROOT, changed, flags
from tests.reporting.made_runs import make_run


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its command, from the wheel that the sdist makes; what it takes is there."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--no-isolation", "--sdist", str(source), "--outdir", str(folder)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(sdist)], check=True, capture_output=True)
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym()]
    return folder / "site"


def command(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": str(installed)
    }
    program = [sys.executable, str(installed / "bin/gan-pipeline"), *arguments]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installation_has_all_it_takes(installed: Path, tmp_path: Path) -> None:
    shipped = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    assert sorted(path.name for path in (installed / "pipeline/configs").glob("*.yaml")) == shipped
    shown = command(installed, tmp_path, "train", "--config", "quickstart", "--print_config")
    assert "name: quickstart" in shown.stdout, shown.stderr
    assert (
        command(installed, tmp_path, "report", str(make_run(tmp_path / "made"))).stdout
        == f"{tmp_path}/made/report.html\n"
    )
    refused = command(installed, tmp_path, "generate", "-g", "nothing.safetensors")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "usage: gan-pipeline prepare" in command(installed, tmp_path, "prepare", "--help").stdout


def test_commands_are_the_programs() -> None:
    def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True)

    listed = pipeline()
    assert (listed.returncode, listed.stdout) == (0, pipeline("--help").stdout)
    for name, (module, purpose) in PROGRAMS.items():
        assert re.search(rf"^  {name} +{purpose}$", listed.stdout, re.MULTILINE)
        assert importlib.util.find_spec(module)
    assert pipeline("--version").stdout == f"gan-pipeline {__version__}\n"
    wrong = pipeline("trian")
    assert (wrong.returncode, wrong.stderr) == (2, "error: trian is no command: did you mean train?\n")


def test_bash_completes_commands_and_settings() -> None:
    """In a real bash, whose function for the command gets what it does when somebody presses Tab."""
    pytest.importorskip("argcomplete")
    script = """
        eval "$(register-python-argcomplete gan-pipeline)"
        complete_line() {
            COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
            read -ra COMP_WORDS <<< "$1"
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _python_argcomplete gan-pipeline "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
            echo "${COMPREPLY[@]}"
        }
        complete_line "gan-pipeline tr"
        complete_line "gan-pipeline train --config quickstart --training.n_cr"
        complete_line "gan-pipeline export --we"
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert shown.stdout.splitlines() == ["train train-classifier", "--training.n_critic ", "--weights "], shown.stderr


def test_the_exports_help_is_whole_sentences() -> None:
    for start in (["pipeline", "export"], ["pipeline.export"]):
        shown = subprocess.run([sys.executable, "-m", *start, "--help"], cwd=ROOT, capture_output=True, text=True)
        text = " ".join(shown.stdout.split())
        assert text.startswith("usage: gan-pipeline export ")
        assert re.search(r"or its images\. positional arguments:", text)


def test_constraints_are_of_what_is_needed_and_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    tested = {name: version for name, _, version in (line.partition("==") for line in lines if line[0] != "#")}
    needed = [Requirement(text) for text in [*project["dependencies"], *extras]]
    assert {requirement.name for requirement in needed} == tested.keys()
    assert all(requirement.specifier.contains(tested[requirement.name]) for requirement in needed)


def test_containers_copy_what_is_there() -> None:
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    allowed = re.findall(r"^!(.+)", (ROOT / "launch/Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = [source for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for source in line.split()]
    definition = (ROOT / "launch/container.def").read_text()
    files = re.findall(r"^    (\S+) /opt", definition.split("%files")[1].split("%post")[0], re.MULTILINE)
    assert set(copied) == set(allowed)
    assert {"pyproject.toml", "pipeline"} <= set(files) <= set(copied)
    assert all((ROOT / source).exists() for source in [*copied, *files])
    assert 'ENTRYPOINT ["gan-pipeline"]' in dockerfile
    assert "gan-pipeline =" in (ROOT / "pyproject.toml").read_text()


def can_be_process_1() -> bool:
    return subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode == 0


IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", sys.executable)
AS_PROCESS_1 = pytest.mark.skipif(
    shutil.which("unshare") is None or not can_be_process_1(), reason="no process namespaces here"
)


def stop(container: subprocess.Popen[bytes]) -> int:
    """As `docker stop` does: SIGTERM to process 1 of the namespace. The exit code."""
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text()
    (first,) = map(int, children.split())
    os.kill(first, signal.SIGTERM)
    return container.wait(timeout=60)


def end(container: subprocess.Popen[bytes]) -> None:
    container.kill()
    container.wait()


@AS_PROCESS_1
def test_a_container_that_is_stopped_while_it_starts_ends(tmp_path: Path) -> None:
    """The kernel would drop the signal: process 1 has no default of its own."""
    started = tmp_path / "started"
    program = "import sys, time; from pathlib import Path; from pipeline.distributed.launcher import run_program\n"
    # Short sleeps: a signal that comes just before a sleep begins is seen at its end.
    program += f"run_program(lambda: (Path({str(started)!r}).touch(), [time.sleep(0.1) for _ in range(1000)])[0])"
    container = subprocess.Popen([*IN_A_CONTAINER, "-c", program], cwd=ROOT)
    try:
        while not started.exists():
            assert container.poll() is None
            time.sleep(0.01)
        assert stop(container) == 128 + signal.SIGTERM
    finally:
        end(container)


@pytest.mark.slow
@AS_PROCESS_1
def test_a_container_that_is_stopped_saves_first(tiny_dataset: Path, tmp_path: Path) -> None:
    config = interruptible(tiny_dataset, tmp_path, "contained", steps=10**6)
    config = changed(config, run={"checkpoint_every": 10**6})
    run, log = RunFolder(config.folder), tmp_path / "log"
    with log.open("wb") as output:
        arguments = [*IN_A_CONTAINER, "-m", "pipeline", "train", *flags(config)]
        container = subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output)
        try:
            wait_for_step(run.path, 5, container, log)
            assert stop(container) == EXIT_PREEMPTED
        finally:
            end(container)
    assert f"stopped after step {find(run).step}, which is saved" in log.read_text()
