#!/usr/bin/env bash
# Calibrates and evaluates under Slurm: tools/slurm_test.sh PARTITION JOB_NAME CONFIG [arguments of tools/test.py]
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS in the environment change how many and how.
set -euo pipefail
if [[ $# -lt 3 ]]; then
  echo "usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG [arguments of tools/test.py]" >&2
  exit 2
fi
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
read -r -a srun_args <<<"${SRUN_ARGS:-}"
exec srun --partition="$1" --job-name="$2" --gres=gpu:"$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 "${srun_args[@]}" \
  "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$3" "${@:4}" --launcher slurm
