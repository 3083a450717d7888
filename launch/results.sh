#!/usr/bin/env bash
# README's table and picture of results: every objective on the quickstart's networks for as long as 2,520 of its
# steps take (90 to 150 s on two cores), three seeds. 40 to 75 minutes in all; given again it goes on with what
# its folder lacks (remove the folder after a change of configs/).
#   launch/results.sh [SCALE [SEED,SEED,... [NAME,NAME,...]]] [-- --KEY VALUE ...]
# SCALE (1) multiplies the steps. The runs are in runs/results-SCALE, and beside them comparison.md, the table,
# comparison.png, a grid of each objective's run with the median FID, and comparison.html with all of it.
set -euo pipefail
cd "$(dirname "$0")/.."
given=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do given+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
# Counted once: 2,520 steps of the quickstart, the others by the processor's seconds that a step of each takes beside it.
declare -A steps=(
  [quickstart]=2520 [lsgan]=2760 [gan]=2760 [acgan]=2540 [rpgan]=2210 [wgan]=2790 [wgan_notebook]=2460 [wgan_gp]=2090
)
# Published rates are for more steps of larger networks: with them LSGAN ended at FID 206. So each objective has its own
# optimiser at the quickstart's rate, and those that clip a bound of 0.1, and all n_critic 1. Of one seed after 900 steps,
# 2e-3 was better than 5e-4 (LSGAN: FID 61 against 156), and rpgan's penalties of 0.5 better than 0.1 (51 against 57).
declare -A found=([wgan]="--training.clip_value 0.1" [wgan_notebook]="--training.clip_value 0.1")
scale=${given[0]:-1} seeds=${given[1]:-0,1,2} names=${given[2]:-$(IFS=,; echo "${!steps[*]}")}
bin=${PYTHON_BIN:-.venv/bin} root=${RUNS:-runs}/results-$scale
for seed in ${seeds//,/ }; do
  for name in ${names//,/ }; do
    run=$name-seed-$seed
    [ ! -e "$root/$run/export" ] || continue
    count=$(awk "BEGIN { print 1 + int(${steps[$name]:?$name is none of ${!steps[*]}} * $scale - .5) }")
    options=(--network.latent_dim 32 --network.width 0.25 --training.seed "$seed" --training.steps "$count")
    options+=(--evaluation.every "$count" --run.sample_every $((count / 10 + 1)) --run.checkpoint_every 250)
    options+=(--training.{critic,generator}_optimizer.learning_rate=2e-3 --training.n_critic 1 ${found[$name]:-})
    case $name in  # what changes over the steps does so over all of them
      quickstart) options+=(--training.{critic,generator}_optimizer.annealing_updates="$count") ;;
      rpgan) options+=(--training.{penalty_annealing,{critic,generator}_optimizer.annealing_updates}="$count") ;;
    esac
    # 3: it diverged, which the page shows
    "$bin/python" pipeline/train.py --config "configs/$name.yaml" --run.root "$root" --run.name "$run" "${options[@]}" "$@" ||
      [ $? -eq 3 ]
  done
done
"$bin/python" pipeline/report.py "$root"
cat "$root/comparison.md"
