#!/usr/bin/env bash
# Trains every combination of settings, as one job array, then compares the runs on one page:
#   launch/slurm/sweep.sh [--dry-run] KEY=VALUE,VALUE,... [KEY=VALUE,...] [SBATCH OPTIONS] -- [--KEY VALUE ...]
# KEY is a setting, or config for files, e.g. config=configs/wgan.yaml,configs/lsgan.yaml training.seed=0,1
# A run is named after its values (wgan-seed-0) under run.root, the page is comparison.html there. It is written when all
# tasks have ended, with what the failed ones left. The same command again trains the runs that have not finished, and no
# others. Prints the numbers of the array, if there is one, and of the report; with --dry-run the commands, and submits none.
set -euo pipefail
cd "$(dirname "$0")/../.."
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "launch/slurm/${0##*/}"; }
source launch/slurm/submit.sh
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
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
runs_of() { "${container[@]}" "$PYTHON_BIN/python" -m pipeline.tuning.grid "$@"; }
runs=$(runs_of "${grid[@]}" -- "$@")
unfinished=$(runs_of --unfinished "${grid[@]}" -- "$@")
mapfile -t runs <<<"$runs"
array=() after=()
if [ -n "$unfinished" ]; then
  SWEEP_GRID=$(printf '%s\n' "${grid[@]}")
  export SWEEP_GRID
  array=("$(submit ARRAY --job-name=sweep --array="$unfinished" "${options[@]}" launch/slurm/train.sbatch "$@")")
  unset SWEEP_GRID
  after=(--dependency="afterany:${array[0]}")
fi
report=$(submit REPORT "${after[@]}" launch/slurm/report.sbatch \
  "${runs[@]}" --out "$(dirname "${runs[0]}")/comparison.html")
[ -n "$dry_run" ] || echo "${array[@]}" "$report"
