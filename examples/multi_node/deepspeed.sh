#!/usr/bin/env bash
# Run once, on a node that can connect to the others by ssh without a password:  deepspeed.sh RUN.yaml [key.sub=value ...]
# HOSTFILE lists the nodes and their numbers of ranks.
set -euo pipefail

deepspeed \
  --hostfile "${HOSTFILE:-examples/multi_node/hostfile}" \
  --no_local_rank \
  --module megatron_ds train "$@"
