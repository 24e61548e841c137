#!/usr/bin/env bash
# Calibrates and evaluates on several processes of this machine:
#   tools/dist_test.sh CONFIG [CHECKPOINT] PROCESSES [options of tools/test.py]
# On several machines: see tools/dist_train.sh.
set -euo pipefail
if [[ $# -ge 3 && $3 =~ ^[0-9]+$ ]]; then
  config=$1 checkpoint=$2 processes=$3
  exec "$(dirname "$0")/dist_run.sh" test "$config" "$processes" "$checkpoint" "${@:4}"
fi
exec "$(dirname "$0")/dist_run.sh" test "$@"
