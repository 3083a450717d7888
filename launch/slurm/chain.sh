#!/usr/bin/env bash
# Training, then an evaluation, then a report, each once the one before it has succeeded:
#   launch/slurm/chain.sh [--dry-run] [SBATCH OPTIONS] -- [--config FILE] [--KEY VALUE ...]
# The options are those of the first two jobs. Prints the three job numbers; with --dry-run the commands, and submits none.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/slurm/site.sh
source launch/slurm/submit.sh
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
read -ra container <<<"$CONTAINER"
run=$("${container[@]}" "$PYTHON_BIN/python" -m pipeline train --print_folder "$@")
after() { echo --dependency="afterok:$1"; }
train=$(submit TRAIN "${options[@]}" launch/slurm/train.sbatch "$@")
evaluate=$(submit EVALUATE --kill-on-invalid-dep=yes "$(after "$train")" "${options[@]}" \
  launch/slurm/evaluate.sbatch "$run")
report=$(submit REPORT --kill-on-invalid-dep=yes "$(after "$evaluate")" launch/slurm/report.sbatch "$run")
[ -n "$dry_run" ] || echo "$train" "$evaluate" "$report"
