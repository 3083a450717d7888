#!/usr/bin/env bash
# Trains each configuration with each seed, as one job array, then compares the runs on one page:
#   launch/slurm/sweep.sh CONFIG,CONFIG,... SEED,SEED,... [SBATCH OPTIONS] -- [--KEY VALUE ...]
# The runs are CONFIG-seed-SEED under run.root, the page is comparison.html there. It is written when all tasks have
# ended, with what the failed ones left. Prints the two job numbers.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/slurm/site.sh
export SWEEP_CONFIGS=${1//,/ } SWEEP_SEEDS=${2//,/ }
shift 2
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
read -ra container <<<"$CONTAINER"
runs=()
for config in $SWEEP_CONFIGS; do
  for seed in $SWEEP_SEEDS; do
    name=$(basename "$config" .yaml)-seed-$seed
    runs+=("$("${container[@]}" "$PYTHON_BIN/python" -m pipeline.config \
      --config "$config" "$@" --training.seed "$seed" --run.name "$name")")
  done
done
array=$(sbatch --parsable --job-name=sweep --array="0-$((${#runs[@]} - 1))" "${options[@]}" \
  launch/slurm/train.sbatch "$@")
report=$(sbatch --parsable --dependency="afterany:$array" launch/slurm/report.sbatch \
  "${runs[@]}" --out "$(dirname "${runs[0]}")/comparison.html")
echo "$array" "$report"
