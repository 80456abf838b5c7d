"""Steps of published runs: the work of each pipeline stage, from the traces of a model and its system's settings."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.operations import Collective, LayerTrace, Message, Work
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.timing.pass_time import Machine
from megatron_ds.planner.timing.placement import Placement, place
from megatron_ds.planner.timing.step_time import StepTime, time_step
from megatron_ds.planner.timing.step_work import EndWork, StageWork, StepWork
from megatron_ds.planner.timing.systems import System, apply, attention_speed, gathered, gradient_work, update_work
from tests.planner.published_model import Sizes, Traced, trace
from tests.planner.published_rows import (
    Row,
    expert_ranks,
    is_sequence,
    layout_of,
    micro_batch_of,
    profile_of,
    recompute_of,
)
from tests.planner.published_systems import Setting, setting_of

Weights = dict[str, tuple[int, int]]
"""Axis -> number of elements of a rank that it divides or copies, and its ranks."""
DEVICES_OF_NODE = 8


def predict(row: Row) -> StepTime:
    """Return the planner's prediction of a row's step."""
    profile, setting, layout = profile_of(row), setting_of(row), layout_of(row)
    assert profile is not None, row["device"]
    device, per_node = find_device(profile, measured=False), min(DEVICES_OF_NODE, row["gpus"])
    network = find_network(setting.network, device, per_node)
    placed = place(layout, network.island, expert_ranks(row, layout))
    stages = placed["pipeline"]
    placed["tied"] = Placement(2, min(2, stages.islands), 2 if stages.islands == 1 else 1)
    machine = Machine(device, network, placed, attention_speed(setting.system, device))
    return time_step(step_of(row, setting, layout), machine)


def step_of(row: Row, setting: Setting, layout: Layout) -> StepWork:
    """Return the work of a row's step."""
    system, sizes = setting.system, Sizes.of(row["model"])
    micro_batch, traced = micro_batch_of(row, setting, layout), traced_of(row, setting, layout)
    chunks = row["vp"] or (setting.chunks if layout.pipeline > 1 else 1)
    stages, held = stages_of(traced, sizes, row, setting, layout, chunks)
    interleaved = chunks > 1 and layout.pipeline > 1
    return StepWork(
        stages,
        {
            rank: end_of(system, sizes, layout, rank, total(held[rank :: layout.pipeline]))
            for rank in range(layout.pipeline)
        },
        layout.pipeline,
        row["global_batch"] // (layout.data * micro_batch),
        row["global_batch"] * sizes.seq,
        row["gpus"],
        nodes=ceil(row["gpus"] / DEVICES_OF_NODE),
        schedule="interleaved" if interleaved else system.schedule,
        blocks=not (interleaved and system.hides_messages),
    )


def traced_of(row: Row, setting: Setting, layout: Layout) -> Traced:
    """Return the traces of a row's model on one of its ranks."""
    return trace(
        Sizes.of(row["model"]),
        micro_batch=micro_batch_of(row, setting, layout),
        tensor=layout.tensor,
        sequence=is_sequence(row, setting, layout),
        context=layout.context,
        expert=expert_ranks(row, layout),
        fused=setting.fused,
    )


def stages_of(
    traced: Traced, sizes: Sizes, row: Row, setting: Setting, layout: Layout, chunks: int
) -> tuple[list[StageWork], list[Weights]]:
    """Return the virtual stages and the weights of each."""
    system, expert = setting.system, expert_ranks(row, layout)
    weights = [block_weights(sizes, layout, expert, number < sizes.dense) for number in range(sizes.layers)]
    end = {"shard": (sizes.embedding_params // layout.tensor, layout.data * layout.context)}
    first_kind, last_kind = traced.blocks[0], traced.blocks[-1]
    again = recompute_of(row, setting)
    dense = gathered(system, apply(system, first_kind, again), weights[0])
    block = gathered(system, apply(system, last_kind, again), weights[-1])
    before, after = ([apply(system, one) for one in some] for some in (traced.before, traced.after))
    counts = blocks_of_stages(sizes.layers, layout.pipeline * chunks)
    stages, held, begin = [], [], 0
    for index, count in enumerate(counts):
        first, last = index == 0, index == len(counts) - 1
        numbers = range(begin, begin + count)
        layers = [dense if number < sizes.dense else block for number in numbers]
        held.append(total([*(weights[number] for number in numbers), *[end] * (first + last)]))
        layers = [*(before if first else []), *layers, *(after if last else [])]
        sends = Work() if last else message(system, block, layout, is_sequence(row, setting, layout))
        stages.append(StageWork(layers, gradient_work(system, sum(num for num, _ in held[-1].values())), sends))
        begin += count
    return stages, held


def end_of(system: System, sizes: Sizes, layout: Layout, rank: int, weights: Weights) -> EndWork:
    """Return the end of a step of a pipeline rank."""
    sent, update = update_work(system, weights)
    if sizes.tied and layout.pipeline > 1 and rank in (0, layout.pipeline - 1):
        num_bytes = system.gradient_bytes * sizes.embedding_params // layout.tensor
        sent[Collective("all_reduce", "tied", num_bytes, 2)] += 1
    return EndWork(sent, 1, update)


def block_weights(sizes: Sizes, layout: Layout, expert: int, is_dense: bool) -> Weights:
    """Return the elements of a block on a rank, by the axis whose ranks hold the same."""
    shards = layout.data * layout.context
    if sizes.moe is None or is_dense:
        return {"shard": ((sizes.attention_params + sizes.mlp_params) // layout.tensor, shards)}
    return {
        "shard": (sizes.attention_params // layout.tensor + sizes.shared_params, shards),
        "expert_shard": (sizes.expert_params // expert, shards * layout.tensor // expert),
    }


def total(each: Iterable[Weights]) -> Weights:
    """Return the sums of elements by axis."""
    found: Weights = {}
    for one in each:
        for axis, (number, ranks) in one.items():
            found[axis] = found.get(axis, (0, ranks))[0] + number, ranks
    return found


def message(system: System, block: LayerTrace, layout: Layout, sequence: bool) -> Work:
    """Return the message of a boundary: with sequence parallelism a rank's part, else all, or a part to gather."""
    num_bytes = block.output_bytes
    if sequence or layout.tensor == 1 or not system.splits_messages:
        return Work({Message("pipeline", num_bytes): 1})
    gather = Collective("all_gather", "tensor", num_bytes, layout.tensor)
    return Work({Message("pipeline", num_bytes // layout.tensor): 1, gather: 1})


def blocks_of_stages(num_blocks: int, num_stages: int) -> list[int]:
    """Return the number of blocks of each virtual stage.

    Embedding and head take the place of a block each if only then all stages have equally many. Else all have as many
    as the largest needs, and the last ones what is left.
    """
    if num_blocks % num_stages and (num_blocks + 2) % num_stages == 0:
        each = (num_blocks + 2) // num_stages
        return [each - (index in (0, num_stages - 1)) for index in range(num_stages)]
    each = ceil(num_blocks / num_stages)
    return [max(0, min(each, num_blocks - index * each)) for index in range(num_stages)]
