"""DeepSpeed's gathers and scatters on CPU, by messages instead of through gloo's collectives; see `parallel.messages`.

ZeRO-3 gathers weights and scatters gradients with them. gloo would allocate the gathered weights a second time, in
fresh memory, copy them, and reduce all gradients on every rank.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.messages import Messages, begin_gather, begin_reduce_scatter


def use_messages(backend: Any) -> None:
    """Let DeepSpeed's communication backend, a `TorchBackend`, gather and scatter by messages. All ranks call it."""
    backend.all_gather_function = _gather
    backend.reduce_scatter_function = _reduce_scatter


def _gather(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Messages | None:
    return _begun(begin_gather(input_tensor, _axis(group), output_tensor)[1], async_op)


def _reduce_scatter(
    output_tensor: Tensor,
    input_tensor: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Messages | None:
    assert op == dist.ReduceOp.SUM, op
    axis = _axis(group)
    if axis.size == 1:
        output_tensor.copy_(input_tensor)
        return _begun(Messages([]), async_op)
    return _begun(begin_reduce_scatter(input_tensor, axis, output_tensor)[1], async_op)


def _begun(messages: Messages, async_op: bool) -> Messages | None:
    if async_op:
        return messages
    messages.wait()
    return None


def _axis(group: dist.ProcessGroup | None) -> Axis:
    group = group or dist.group.WORLD
    assert group is not None
    ranks = tuple(dist.get_process_group_ranks(group))
    return Axis(len(ranks), dist.get_rank(group), ranks, group)
