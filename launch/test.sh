#!/usr/bin/env bash
# Installs with the development extras, then: formatter check, linter, type checker beside the quick tests, which need
# neither Slurm nor a browser nor more than about two seconds of a core each.
#   --all       all tests, and those of sums once more as on an older processor
#   --seed N    files and tests in a random order, but for the longest files, which come first
# Further arguments go to pytest, which then runs once and takes of all tests those that they name.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=(-m "not slow and not slurm and not browser")
selection=("${quick[@]}") order=() older_too=
while [ $# -gt 0 ]; do
  case $1 in
    --all) selection=() older_too=yes; shift ;;
    --seed) order=(--random-order-seed "${2:?--seed takes a number}"); shift 2 ;;
    *) selection=() older_too= ; break ;;
  esac
done
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -V)" != "$(.venv/bin/python -V)" ]; then
  echo "error: PYTHON is $PYTHON, but .venv has $(.venv/bin/python -V): delete .venv, and it is made anew" >&2
  exit 2
fi
.venv/bin/python -m pip install --quiet -e '.[dev]'
sync  # gigabytes were just written: an fsync of a test would wait for all of them, while its ranks wait for each other
processes=${TEST_PROCESSES:-$(($(nproc) + 1))}  # one more than cores: some tests wait
export OMP_NUM_THREADS=1  # the tests run side by side; nproc would count by it
tests() {
  .venv/bin/pytest -n "$processes" --dist loadfile --no-loadscope-reorder "${order[@]}" "$@"
}
code=(README.md .github configs launch pipeline tests)  # not what somebody keeps beside them, such as my_losses.py
.venv/bin/ruff format --check "${code[@]}"
.venv/bin/ruff check "${code[@]}"
types=$(mktemp) status=0
trap 'rm -f "$types"' EXIT
.venv/bin/mypy >"$types" 2>&1 &
tests "${selection[@]}" "$@" || status=$?
wait $! || status=$?
cat "$types"
if [ -n "$older_too" ]; then
  # Processors add in different orders, and no test may ask for the sums of one. What is left out computes none.
  ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=AVX2 tests "${quick[@]}" \
    tests/{benchmarking,evaluation,export,models,training,test_api.py,test_compat.py,test_configs.py,test_rng.py} \
    --ignore=tests/{benchmarking/test_measure,evaluation/test_targets,export/test_{generate,hub},training/test_trackers}.py \
    || status=$?
fi
exit $status
