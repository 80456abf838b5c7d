"""Sums of gradients over data ranks where DeepSpeed would copy all of them first, even with one data rank."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from megatron_ds.parallel.grid import Grid


def reduces_itself(deepspeed_engine: Any) -> bool:
    """Return whether `average_over_data` is to be called instead of DeepSpeed's own reduction.

    So it is at ZeRO-0, and at ZeRO-1 in bf16, where DeepSpeed keeps all gradients in fp32 on every data rank.
    """
    return deepspeed_engine.zero_optimization_stage() == 0 or isinstance(deepspeed_engine.optimizer, BF16_Optimizer)


def average_over_data(deepspeed_engine: Any, grid: Grid, bucket: int) -> None:
    """Average the accumulated gradients over data ranks, `bucket` elements at a time. Collective over shard.

    Those of experts are summed over the ranks that have them, and divided by the number of data ranks. At ZeRO-0 a
    bucket is copied into one tensor and back. The fp32 gradients of ZeRO-1 in bf16 are flat tensors already, whose
    parts are reduced in place.
    """
    if grid.shard.size == 1 and not (deepspeed_engine.has_moe_layers and grid.expert_shard.size > 1):
        return
    if not isinstance(deepspeed_engine.optimizer, BF16_Optimizer):
        deepspeed_engine.allreduce_gradients(bucket_size=bucket)
        return
    flat, of_experts = deepspeed_engine.optimizer.get_grads_for_reduction()

    def parts(gradients: list[Tensor]) -> list[Tensor]:
        return [part for one in gradients for part in one.split(bucket)]

    deepspeed_engine._reduce_non_expert_gradients(parts(flat), elements_per_buffer=0)  # a bucket for each part
    by_group = {name: parts(gradients) for name, gradients in of_experts.items()}
    deepspeed_engine._reduce_expert_gradients(by_group, elements_per_buffer=0)
