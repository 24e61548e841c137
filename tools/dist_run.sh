#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share: dist_run.sh TOOL CONFIG PROCESSES [arguments of the tool]
set -euo pipefail
if [[ $# -lt 3 || ! $3 =~ ^[0-9]+$ ]]; then
  echo "usage: tools/dist_$1.sh CONFIG PROCESSES [options of tools/$1.py]; got: ${*:2}" >&2
  exit 2
fi
tool=$1 config=$2 processes=$3
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$processes" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
  "$(dirname "$0")/$tool.py" "$config" "${@:4}" --launcher pytorch
