#!/usr/bin/env bash
# gpu_check.sh [--seconds N] [--json FILE] [-k NAME ...] [-- SETTINGS]: what this machine's GPUs must show before they are
# trusted or timed (tests/gpu), the most valuable first; with --seconds nothing starts that does not fit into what is left.
# No network, nothing is installed: PYTHON names the interpreter, PYTHONPATH may add packages. Other options are pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # first: another package may be called tests, too
options=() seconds=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [ "$1" != --seconds ] || seconds=${2:?--seconds takes a number}
  options+=("$1"); shift
done
[ $# -eq 0 ] || shift
python=${PYTHON:-python3}
if ! "$python" -c "import pytest" 2>/dev/null; then
  echo "error: $python has no pytest: $python -m pip install pytest, or name another PYTHON" >&2
  exit 2
fi
command=("$python" -m pytest -p no:cacheprovider -W default -rs -m gpu --need-gpu tests/gpu "${options[@]}" "--settings=${*@Q}")
# A kernel that hangs can't be interrupted from Python.
[ -z "$seconds" ] || command=(timeout -k 8 "$seconds" "${command[@]}")
exec "${command[@]}"
