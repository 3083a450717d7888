"""The layering that keeps the package readable: imports point one way, and few modules know of other processes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT

PACKAGE = ROOT / "pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high: a module imports from lower layers, and from its own folder.
LAYERS = [
    {"errors", "compat", "__version__"},
    {"config"},
    {"rng", "models"},
    {"distributed"},
    {"storage"},
    {"data", "reporting"},
    {"export"},
    {"evaluation"},
    {"checks"},
    {"training"},
    {"benchmarking", "tuning"},
    {"train", "evaluate", "generate", "prepare", "report", "doctor", "benchmark", "checkpoint", "tune", "__main__"},
]
PROGRAM_LINES, FLAT_MODULES = 60, 14


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    part = part_of(path)
    for name in imports(path):
        if name.startswith("pipeline."):
            other = name.split(".")[1]
            assert other == part or layer_of(other) < layer_of(part), f"{part} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_knows_of_other_processes(path: Path) -> None:
    """But for the checkpoint's files, which torch writes from all ranks, the plain port, which knows no better, and a
    check of GPUs that is a process group by itself."""
    if part_of(path) not in ("distributed", "compat"):
        allowed: tuple[str, ...] = {
            "storage": ("torch.distributed.checkpoint",),
            "benchmarking": ("torch.nn.parallel", "torch.distributed"),
        }.get(part_of(path), ())
        assert not [
            name
            for name in imports(path)
            if name.startswith(("torch.distributed", "torch.nn.parallel", "accelerate"))
            and not name.startswith(allowed)
        ]


def test_only_distributed_reads_the_environment() -> None:
    readers = {part_of(path) for path in MODULES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert readers == {"distributed", "__main__"}  # what a shell asks argcomplete for


def test_only_the_run_folder_names_what_a_run_holds() -> None:
    names = (
        "metrics.jsonl",
        "environment.json",
        "report.html",
        "generator.safetensors",
        "step-{",
        "-interpolation.png",
    )
    for path in MODULES:
        if path != PACKAGE / "storage/run_folder.py":
            texts = [
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 40
            ]
            assert not [text for text in texts for name in names if name in text], path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_takes_a_standard_librarys_name(path: Path) -> None:
    """`pipeline/` is on the path when a script in it is launched."""
    assert path.stem not in sys.stdlib_module_names


def test_programs_only_parse_build_run_and_close() -> None:
    flat = [path for path in MODULES if path.parent == PACKAGE]
    assert len(flat) <= FLAT_MODULES
    for path in flat:
        if path.stem in LAYERS[-1]:
            assert len(path.read_text().splitlines()) < PROGRAM_LINES, path


def test_readmes_name_every_folder_and_file() -> None:
    """The nearest README above a module names it."""
    house = (PACKAGE / "README.md").read_text()
    for wing in {path.parent for path in MODULES} - {PACKAGE}:
        if wing.parent == PACKAGE:
            assert f"]({wing.name}/README.md)" in house, wing
    for path in MODULES:
        if path.name != "__init__.py":
            readme = next(above / "README.md" for above in path.parents if (above / "README.md").exists())
            if readme.parent == PACKAGE and path.parent != PACKAGE:
                continue  # a folder whose README is still to be written
            assert re.search(rf"\b{re.escape(path.name)}`", readme.read_text()), f"{readme} does not name {path}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "imported"),
    [
        (["pipeline/train.py", "--help"], {"torch", "accelerate", "matplotlib", "torchvision", "webdataset"}),
        (["-c", "import pipeline"], {"torch", "numpy", "yaml", "jsonargparse"}),
        (["-c", "from pipeline import Config, configure; configure('quickstart')"], {"torch", "numpy", "tqdm"}),
        *(
            ([f"pipeline/{name}.py", *arguments], {"torch", "matplotlib"})
            for name, *arguments in (("evaluate", "--help"), ("generate", "--help"), ("report", "--help"))
        ),
        (
            ["-c", "import pipeline.training.trainer"],
            {"matplotlib", "torchvision", "torch_fidelity", "torch._dynamo", "h5py"},
        ),
    ],
    ids=["train", "package", "settings", "evaluate", "generate", "report", "trainer"],
)
def test_a_program_imports_what_it_runs(command: list[str], imported: set[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seen = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert not seen & imported
