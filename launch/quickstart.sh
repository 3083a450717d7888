#!/usr/bin/env bash
# From nothing to digits, a FID and a report: makes .venv, installs, prepares MNIST, trains configs/quickstart.yaml,
# evaluates. Run it again after an interruption and it goes on. Arguments go to the training (--KEY VALUE).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -V)" != "$(.venv/bin/python -V)" ]; then
  echo "error: PYTHON is $PYTHON, but .venv has $(.venv/bin/python -V): delete .venv, and it is made anew" >&2
  exit 2
fi
if [ ! .venv/installed -nt pyproject.toml ]; then
  echo "installing (a few GB, some minutes)" >&2
  .venv/bin/python -m pip install --quiet -e .
  touch .venv/installed
fi
.venv/bin/python pipeline/train.py --config configs/quickstart.yaml "$@"
echo "README's commands take this environment: source .venv/bin/activate" >&2
