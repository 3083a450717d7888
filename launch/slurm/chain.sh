#!/usr/bin/env bash
# Training, then an evaluation, then a report, each once the one before it has succeeded:
#   launch/slurm/chain.sh [SBATCH OPTIONS] -- [--config FILE] [--KEY VALUE ...]
# The options are those of the first two jobs. Prints the three job numbers.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/slurm/site.sh
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
read -ra container <<<"$CONTAINER"
run=$("${container[@]}" "$PYTHON_BIN/python" -m pipeline.config "$@")
after() { echo --dependency="afterok:$1"; }
train=$(sbatch --parsable "${options[@]}" launch/slurm/train.sbatch "$@")
evaluate=$(sbatch --parsable --kill-on-invalid-dep=yes "$(after "$train")" "${options[@]}" \
  launch/slurm/evaluate.sbatch "$run")
report=$(sbatch --parsable --kill-on-invalid-dep=yes "$(after "$evaluate")" launch/slurm/report.sbatch "$run")
echo "$train" "$evaluate" "$report"
