#!/usr/bin/env bash
# Run on each node, with the same arguments:  HEAD=node1 NODES=2 RANKS_PER_NODE=4 torchrun.sh RUN.yaml [key.sub=value ...]
# RESTARTS=3 starts the ranks again, at most so often, when one of them or a machine has died. A machine that comes back,
# or another one, joins by the same command.
set -euo pipefail

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # without it a machine that joins later does not learn the master's address

torchrun \
  --nnodes "${NODES:?number of nodes}" \
  --nproc-per-node "${RANKS_PER_NODE:?ranks on this node, usually its GPUs}" \
  --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:?name of one of the nodes}:${PORT:-29500}" \
  -m megatron_ds train "$@"
