#!/usr/bin/env bash
# Trains on several processes of this machine, one a GPU (or, without GPUs, on its CPU cores):
#   tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]
# On several machines, in each: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_train.sh ...
set -euo pipefail
exec "$(dirname "$0")/dist_run.sh" train "$@"
