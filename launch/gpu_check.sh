#!/usr/bin/env bash
# Whether the pipeline does on this machine's GPUs what it promises: a table, also as JSON; ends with 0 if every row
# holds. Ten minutes at most, no network, nothing is installed: PYTHON names the interpreter, PYTHONPATH may add packages.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m pipeline.benchmarking.gpu_check "$@"
