#!/usr/bin/env bash
# Run on each node, with the same arguments:  HEAD=node1 NODES=2 RANKS_PER_NODE=4 torchrun.sh RUN.yaml [key.sub=value ...]
set -euo pipefail

torchrun \
  --nnodes "${NODES:?number of nodes}" \
  --nproc-per-node "${RANKS_PER_NODE:?ranks on this node, usually its GPUs}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:?name of one of the nodes}:${PORT:-29500}" \
  -m megatron_ds train "$@"
