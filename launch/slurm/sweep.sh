#!/usr/bin/env bash
# Trains every combination of settings, as one job array, then compares the runs on one page:
#   launch/slurm/sweep.sh KEY=VALUE,VALUE,... [KEY=VALUE,...] [SBATCH OPTIONS] -- [--KEY VALUE ...]
# KEY is a setting, or config for files, e.g. config=configs/wgan.yaml,configs/lsgan.yaml training.seed=0,1
# A run is named after its values (wgan-seed-0) under run.root, the page is comparison.html there. It is written when all
# tasks have ended, with what the failed ones left. Prints the two job numbers.
set -euo pipefail
cd "$(dirname "$0")/../.."
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "launch/slurm/${0##*/}"; }
case ${1:-} in
  -h | --help) usage; exit ;;
  -* | '') usage >&2; exit 2 ;;
esac
source launch/slurm/site.sh
grid=() options=()
while [[ ${1:-} == [!-]*=* ]]; do grid+=("$1"); shift; done
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
read -ra container <<<"$CONTAINER"
runs=$("${container[@]}" "$PYTHON_BIN/python" -m pipeline.tuning.grid "${grid[@]}" -- "$@")
mapfile -t runs <<<"$runs"
SWEEP_GRID=$(printf '%s\n' "${grid[@]}")
export SWEEP_GRID
array=$(sbatch --parsable --job-name=sweep --array="0-$((${#runs[@]} - 1))" "${options[@]}" \
  launch/slurm/train.sbatch "$@")
report=$(sbatch --parsable --dependency="afterany:$array" launch/slurm/report.sbatch \
  "${runs[@]}" --out "$(dirname "${runs[0]}")/comparison.html")
echo "$array" "$report"
