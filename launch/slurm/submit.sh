# Sourced by chain.sh and sweep.sh: `submit NAME ARGUMENTS` submits a job and prints its number. In a dry run (dry_run=1)
# the command goes to the script's output instead, and NAME stands for the number that the job would have.
exec 3>&1
dry_run=
submit() {
  local name=$1 command
  shift
  if [ -z "$dry_run" ]; then
    sbatch --parsable "$@"
    return
  fi
  printf -v command '%q ' sbatch "$@"
  echo "${SWEEP_GRID:+SWEEP_GRID=${SWEEP_GRID@Q} }${command% }" >&3
  echo "$name"
}
