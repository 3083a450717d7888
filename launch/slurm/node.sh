#!/usr/bin/env bash
# One task of a job step on each node: starts the node's ranks with one `accelerate launch`.
#   srun --ntasks-per-node=1 launch/slurm/node.sh SCRIPT [ARGUMENTS]
# The ranks meet at the job's first node, on a port that follows from the job's number.
set -euo pipefail
if [ -n "$NETWORK_INTERFACE" ]; then
  export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
ranks=${SLURM_GPUS_ON_NODE:-$RANKS_PER_NODE}
total=$((ranks * SLURM_NNODES))
if [ "$total" -gt 1 ]; then
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  settings=(
    --config_file launch/accelerate/nodes.yaml
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$total"
    --main_process_ip "${nodes%%$'\n'*}" --main_process_port $((20000 + SLURM_JOB_ID % 10000))
  )
elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  settings=(--config_file launch/accelerate/gpu.yaml)
else
  settings=(--config_file launch/accelerate/cpu.yaml --num_cpu_threads_per_process 1)
fi
read -ra container <<<"$CONTAINER"
# exec: a signal for this task is then one for the launcher.
exec "${container[@]}" "$PYTHON_BIN/accelerate" launch "${settings[@]}" --no_python launch/slurm/rank.sh "$@"
