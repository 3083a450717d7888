#!/usr/bin/env bash
# One rank. The first one writes to the job's log, the others each to a file of their own: the log stays legible.
set -euo pipefail
if [ "${RANK:-0}" -gt 0 ]; then
  exec >>"$RANK_LOGS/rank-$RANK.log" 2>&1
fi
exec "$PYTHON_BIN/python" "$@"
