# Sourced by the batch scripts: run_step SCRIPT [ARGUMENTS] runs a program on all ranks of the job.
cd "$SLURM_SUBMIT_DIR"
source launch/slurm/site.sh
# The other ranks' logs, beside the job's own.
export RANK_LOGS=slurm-$SLURM_JOB_NAME-$SLURM_JOB_ID

# Returns the step's exit code: that of `accelerate launch`, 0 or 1.
run_step() {
  local code step log
  mkdir -p "$RANK_LOGS"
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 launch/slurm/node.sh "$@" &
  step=$!
  while true; do
    signalled=
    wait "$step" && code=0 || code=$?
    [ -n "$signalled" ] || break  # a trapped signal ends `wait` before the step ends
  done
  if [ "$code" -ne 0 ]; then
    for log in "$RANK_LOGS"/rank-*.log; do
      if [ -s "$log" ]; then
        echo "==> the last lines of $log <=="
        tail -n 5 "$log"
      fi
    done >&2
  fi
  return "$code"
}
