#!/usr/bin/env bash
# Time to quality: the seconds of training, evaluations left out, up to the first evaluation with an FID of at most 20.
#   launch/speedrun.sh [CONFIG [SEED,SEED,... [FID]]] [-- --KEY VALUE ...]
# Trains the configuration (configs/quickstart.yaml) with each seed (0 to 4) from its first step to its last in a new
# folder and prints, after the seconds of each, median and worst as a line of README's table of records. What is known to
# be good enough sooner may end sooner, and the more evaluations there are, the finer is the measure:
#   launch/speedrun.sh configs/quickstart.yaml -- --training.steps 1200 --evaluation.every 100
set -euo pipefail
cd "$(dirname "$0")/.."
given=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
config=${given[0]:-configs/quickstart.yaml} seeds=${given[1]:-0,1,2,3,4} fid=${given[2]:-20}
bin=${PYTHON_BIN:-.venv/bin}
device=$(nvidia-smi --list-gpus >/dev/null 2>&1 && echo gpu || echo cpu)
set -- --config "$config" --run.root "runs/speedrun-$(date -u +%Y%m%dT%H%M%S)" "$@"
runs=()
for seed in ${seeds//,/ }; do
  set_seed=(--run.name "seed-$seed" --training.seed "$seed")
  "$bin/accelerate" launch --config_file "launch/accelerate/$device.yaml" --num_cpu_threads_per_process 1 \
    pipeline/train.py "$@" "${set_seed[@]}"
  runs+=("$("$bin/python" -m pipeline train --print_folder "$@" "${set_seed[@]}")")
done
"$bin/python" -m pipeline.reporting.record "$fid" "${runs[@]}"
