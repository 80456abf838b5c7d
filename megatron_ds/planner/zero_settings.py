"""Settings of DeepSpeed 0.19.8's ZeRO that decide what a step communicates and allocates, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ds.config import adapt_to_device, summarize_deepspeed
from megatron_ds.planner.held_parameters import folds_experts
from megatron_ds.planner.plan_input import PlanInput

DTYPE_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
UNLIMITED = 2**63 - 1
FP32_NAMES = ("fp32", "float32", "torch.float32")

_ALIGNMENT = 2  # elements: flat buffers are padded to a multiple of it for each data rank


@dataclass(frozen=True)
class ZeroSettings:
    """The section `zero_optimization`, filled; sizes are numbers of elements. Fields are named as in the JSON.

    Attributes:
        bf16_sums: DeepSpeed's optimizer for bf16 at stage 1, which keeps all gradients in fp32 on every data rank.
        element_bytes: of a weight.
        reduced_bytes: of an element of a gradient that is reduced.
        accumulated_bytes: of an element of a gradient that is added up over micro-batches.
        offloads_optimizer: gradients and optimizer state are in host memory, or on NVMe.
        hpz: `zero_hpz_partition_size`, consecutive ranks among which stage 3 shards weights a second time.
    """

    stage: int
    element_bytes: int
    reduced_bytes: int
    accumulated_bytes: int
    bf16_sums: bool
    offloads_optimizer: bool
    offloads_weights: bool
    reduce_bucket_size: int
    contiguous_gradients: bool
    overlap_comm: bool
    reduce_scatter: bool
    use_multi_rank_bucket_allreduce: bool
    prefetch_bucket_size: int
    param_persistence_threshold: int
    model_persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int
    sub_group_size: int
    use_all_reduce_for_fetch_params: bool
    allgather_sequential: bool
    hpz: int


def zero_settings(given: PlanInput) -> ZeroSettings:
    """Return the settings of a run's ZeRO, as the engine fills them."""
    summary, layout = summarize_deepspeed(given.engine.deepspeed), given.layout
    shards = layout.data * layout.context
    if folds_experts(given):
        shards = max(shards, shards * layout.tensor // given.expert_ranks)
    filled = adapt_to_device(given.engine.deepspeed, given.machines.device_type, shards)
    section: dict[str, Any] = filled.get("zero_optimization", {})

    def value(name: str, default: Any) -> Any:
        return section.get(f"stage3_{name}", section.get(name, default))

    stage, precision = summary.zero_stage, summary.precision
    accumulated = (filled.get("data_types") or {}).get("grad_accum_dtype")
    reduced = filled.get("communication_data_type") or precision
    return ZeroSettings(
        stage=stage,
        element_bytes=DTYPE_BYTES[precision],
        reduced_bytes=DTYPE_BYTES[reduced],
        accumulated_bytes=4 if accumulated in FP32_NAMES else DTYPE_BYTES[precision],
        bf16_sums=precision == "bf16" and stage == 1 and accumulated in FP32_NAMES and not summary.offload_optimizer,
        offloads_optimizer=summary.offload_optimizer,
        offloads_weights=summary.offload_param,
        reduce_bucket_size=int(section["reduce_bucket_size"]),
        contiguous_gradients=value("contiguous_gradients", True),
        overlap_comm=stage == 3 if value("overlap_comm", None) is None else value("overlap_comm", None),
        reduce_scatter=value("reduce_scatter", True),
        use_multi_rank_bucket_allreduce=value("use_multi_rank_bucket_allreduce", True),
        prefetch_bucket_size=int(value("prefetch_bucket_size", 50_000_000)),
        param_persistence_threshold=int(value("param_persistence_threshold", 100_000)),
        model_persistence_threshold=int(value("model_persistence_threshold", UNLIMITED)),
        max_live_parameters=int(value("max_live_parameters", 1_000_000_000)),
        max_reuse_distance=int(value("max_reuse_distance", 1_000_000_000)),
        sub_group_size=int(value("sub_group_size", 1_000_000_000)),
        use_all_reduce_for_fetch_params=value("use_all_reduce_for_fetch_params", False),
        allgather_sequential=value("allgather_sequential", False),
        hpz=max(1, summary.hpz_partition_size),
    )


def padded(numel: int, ranks: int, alignment: int = _ALIGNMENT) -> int:
    """Return the number of elements of a flat buffer that ZeRO-1 and 2 divide over data ranks, padding included."""
    return -(-numel // (alignment * ranks)) * alignment * ranks
