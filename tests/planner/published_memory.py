"""Memory of published runs, for information: a system's state of weights, and activations by the traces of layers.

It leaves out buffers of communication, what the allocator holds, and the CUDA context, which sources that read
nvidia-smi count. The memory of this package's own runs is `planner.memory.stage`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ds.planner.operations import Attention, LayerTrace
from megatron_ds.planner.timing.step_time import StepTime
from megatron_ds.planner.timing.systems import MASK_BYTES, SCORE_BYTES, System
from tests.planner.published_model import Sizes
from tests.planner.published_rows import Row, layout_of, recompute_of
from tests.planner.published_step import stages_of, total, traced_of
from tests.planner.published_systems import setting_of

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Memory of the first pipeline rank.

    Attributes:
        state_bytes: weights, gradients and the optimizer's state.
        activation_bytes: of all micro-batches in flight.
    """

    state_bytes: float
    activation_bytes: float


def memory_of(row: Row, time: StepTime) -> Memory:
    """Return the memory of a row whose step was predicted."""
    setting, layout, sizes = setting_of(row), layout_of(row), Sizes.of(row["model"])
    system, traced, again = setting.system, traced_of(row, setting, layout), recompute_of(row, setting)
    stages, held = stages_of(traced, sizes, row, setting, layout, time.timetable.num_chunks)
    state = sum(number * state_bytes(system, ranks) for number, ranks in total(held[:: layout.pipeline]).values())
    each = kept_bytes(system, traced.blocks[-1], again) * sum(layer.is_block for layer in stages[0].layers)
    live = kept_bytes(system, traced.blocks[-1], "none") if again == "full" else 0
    ends = sum(one.kept_bytes for one in traced.after) if layout.pipeline == 1 else 0
    return Memory(state, time.timetable.in_flight[0] * each + max(live, ends))


def state_bytes(system: System, ranks: int) -> float:
    """Return the bytes of an element on a rank: half weights, gradients, fp32 weights and two moments."""
    apart = system.gradient_bytes if system.gradient_bytes == 4 else 0
    gradients = 4 if system.fuses_gradients else 2 + apart
    if system.state == "sharded":
        return (2 + gradients + 12) / ranks
    return 2 + gradients + 12 / (1 if system.state == "replicated" else ranks)


def kept_bytes(system: System, block: LayerTrace, recompute: str) -> int:
    """Return what a block keeps for its backward pass."""
    if recompute == "full":
        return block.output_bytes
    scores = 0
    for one in block.forward:
        if isinstance(one, Attention) and system.attention == "unfused" and recompute == "none":
            copies = 2 * SCORE_BYTES + MASK_BYTES if system.drops_scores else SCORE_BYTES
            scores += one.rows * one.heads * one.queries * one.keys * copies
    return block.kept_bytes + scores


def published_gib(row: Row) -> float | None:
    """Return the published memory of a device, of whatever the source has counted."""
    measured = row["measured"]
    if measured.get("mem_params_opt_gib"):
        return float(measured["mem_params_opt_gib"] + measured["mem_act_gib"])
    if measured.get("mem_gib_max"):
        return float(measured["mem_gib_max"])
    return float(measured["mem_gb"] * 1e9 / GIB) if measured.get("mem_gb") else None
