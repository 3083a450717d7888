#!/usr/bin/env bash
# From nothing to digits, a FID and a report: makes .venv, installs, prepares MNIST, trains configs/quickstart.yaml,
# evaluates. Run it again after an interruption and it goes on. Arguments go to the training (--KEY VALUE).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing (the first time: a few GB, some minutes)" >&2
.venv/bin/python -m pip install --quiet -e .
settings=launch/accelerate/cpu.yaml
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then
  settings=launch/accelerate/gpu.yaml
fi
.venv/bin/accelerate launch --config_file "$settings" pipeline/train.py --config configs/quickstart.yaml "$@"
