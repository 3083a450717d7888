# Sourced by the batch scripts: run_step SCRIPT [ARGUMENTS] runs a program on all ranks of the job; after take_signals,
# run_to_the_end SCRIPT [ARGUMENTS] runs one that saves and stops, and queues the job again when it did.
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

# Signals to a step reach launchers and start-up code that die of them, so the request to stop is a file. The program
# removes it once it has saved and stopped (run_program); after any other end there is nothing to go on with.
# In /tmp, since the first rank looks for it and runs on this very node.
take_signals() {
  scratch=$(mktemp -d /tmp/slurm-train-XXXXXX)
  export PIPELINE_STOP_FILE=$scratch/stop
  stopping=
  trap 'rm -rf "$scratch"' EXIT
  trap 'signalled=1 stopping=1; touch "$PIPELINE_STOP_FILE"' USR1
}

run_to_the_end() {
  local code
  run_step "$@" && code=0 || code=$?
  if [ -n "$stopping" ] && [ ! -e "$PIPELINE_STOP_FILE" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
