#!/usr/bin/env bash
# Installs with the development extras, then: formatter check, linter, type checker, tests. With --fast only the tests
# that take seconds. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
selection=()
if [ "${1:-}" = --fast ]; then
  selection=(-m "not slow and not slurm")
  shift
fi
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet -e '.[dev]'
sync  # gigabytes were just written: an fsync of a test would wait for all of them, while its ranks wait for each other
processes=${TEST_PROCESSES:-$(($(nproc) + 1))}  # one more than cores: some tests wait
export OMP_NUM_THREADS=1  # the tests run side by side; nproc would count by it
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/pytest -n "$processes" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
