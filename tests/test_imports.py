"""The layering that keeps the package readable: imports point one way, and few modules know of other processes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high: a module imports from lower layers, and from its own package.
LAYERS = [
    {"errors"},
    {"config", "progress", "convolutions"},
    {"networks", "objectives", "rng", "storage", "distributed"},
    {"state", "updates", "data", "runtime", "pictures", "keras_h5"},
    {"step"},
    {"checkpoint", "metrics", "report"},
    {"export", "scoring"},
    {"trainer"},
    {"baseline"},
    {"train", "evaluate", "generate", "prepare", "benchmark", "doctor"},
]
SINGLE_PROCESS = {
    "config",
    "convolutions",
    "networks",
    "objectives",
    "rng",
    "state",
    "updates",
    "data",
    "pictures",
    "keras_h5",
    "report",
}


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
def test_most_modules_know_one_process(path: Path) -> None:
    if part_of(path) in SINGLE_PROCESS:
        assert not [name for name in imports(path) if name.startswith(("torch.distributed", "accelerate"))]


def test_only_runtime_reads_the_environment() -> None:
    readers = {part_of(path) for path in MODULES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert readers == {"runtime"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_takes_a_standard_librarys_name(path: Path) -> None:
    """`pipeline/` is on the path when a script in it is launched."""
    assert path.stem not in sys.stdlib_module_names
