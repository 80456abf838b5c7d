"""Memory of one rank of a pipeline stage, by part, at the moment of a training step when it holds most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_ds.models.sequential import LayerSpec
from megatron_ds.planner.held_parameters import HeldStage, build_context, compiled_layers, hold_stage
from megatron_ds.planner.memory.engine import (
    AVERAGE,
    MASTERS,
    OPTIMIZER,
    Bf16Engine,
    EngineMemory,
    EngineSetting,
    PlainEngine,
)
from megatron_ds.planner.memory.ledger import Ledger
from megatron_ds.planner.memory.optimizer_state import state_bytes_of
from megatron_ds.planner.memory.stage_run import Boundary, StageRun, one_stage, pipelined_stage
from megatron_ds.planner.memory.update import factor_bytes_of, update_bytes_of
from megatron_ds.planner.memory.zero import FlatEngine, partitions_to_plan
from megatron_ds.planner.memory.zero3 import DividedEngine
from megatron_ds.planner.moments import ModulePass
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.weight_schedule import module_passes
from megatron_ds.planner.zero_settings import zero_settings

INT64 = 8  # bytes of an id
CONTEXT_BYTES = 700 * 2**20
"""CUDA's context, the kernels of torch, cuBLAS and ours, and cuBLAS's workspaces."""
COMMUNICATION_BYTES = 300 * 2**20
"""NCCL's buffers and kernels of one axis of several ranks. With the context they take 1 to 3 GB."""
FRAGMENTATION = 0.03
"""Share of the tensors' memory that torch's allocator has and cannot give, with segments that grow."""
ALLOWANCES = ("context", "communication", "fragmentation")
"""The parts that are no tensors."""


@dataclass(frozen=True)
class StageMemory:
    """The memory of the rank of a pipeline stage that needs most of it.

    Attributes:
        stage: index of the pipeline stage.
        parts: part -> bytes on the device at the peak: "weights", "masters", "optimizer", "averaged weights", "update"
            (what the optimizer needs while it updates), "gradients", "buckets", "gathered weights", "activations" with
            all temporaries, "gradients of activations", "boundaries" (what pipeline stages exchange), "batch", and on a
            GPU "context", "communication" and "fragmentation". Parts of which nothing is held are left out.
        when: the moment of the peak, such as "backward pass of blocks.3, micro-batch 2".
        host_parts: part -> bytes in host memory: what is offloaded, and copies of asynchronous saves.
        in_flight: the most micro-batches whose activations are held at once.
    """

    stage: int
    parts: Mapping[str, int]
    when: str
    host_parts: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 1

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory, of this rank."""
        return sum(self.host_parts.values())


def plan_memory(
    given: PlanInput, traces: Sequence[LayerTrace], stage: int, held: HeldStage | None = None
) -> StageMemory:
    """Return the memory of a pipeline stage in a step that is not the first.

    Tokens are taken to be routed evenly to experts.

    Args:
        given: the run.
        traces: of all layers of the model, from `trace_layers(given.layers, given.trace_setting())`.
        stage: index of the pipeline stage.
        held: its parameters; None = they are found here.
    """
    held = held or hold_stage(given, stage)
    setting = engine_setting(given, held)
    found = [_plan_rank(given, traces, held, setting, rank) for rank in partitions_to_plan(held, setting)]
    return max(found, key=lambda one: one.peak_bytes)


def _plan_rank(
    given: PlanInput, traces: Sequence[LayerTrace], held: HeldStage, setting: EngineSetting, rank: int
) -> StageMemory:
    """Return the memory of the rank that has a partition of ZeRO's states."""
    layers, layout, count = held.layers, given.layout, given.num_micro_batches
    specs = given.layers(build_context(given))
    on_cpu = given.machines.device_type == "cpu"
    device = Ledger()
    host = device if on_cpu else Ledger()
    own = [traces[index] for index in layers]
    if on_cpu:  # what layers keep on the host is in the same memory
        own = [replace(trace, kept_bytes=trace.kept_bytes + trace.host_bytes) for trace in own]
    run = StageRun(
        own,
        held,
        specs[layers.start : layers.stop],
        make_engine(held, setting, device, host, rank, module_passes(traces)),
        boundary_of(given, specs, layers.start, layers.stop) if layout.pipeline > 1 else Boundary(),
        pipelined_stage(held.index, layout.pipeline, count) if layout.pipeline > 1 else one_stage(count),
        batch_bytes(given) + sum(trace.shared_bytes for trace in traces),
    )
    run.run()
    parts, hosted = dict(device.peak_parts), {} if on_cpu else dict(host.peak_parts)
    if not on_cpu:
        parts |= device_allowances(given, sum(parts.values()))
        if given.config.offload_activations:
            hosted["activations"] = run.in_flight * sum(trace.host_bytes for trace in own)
        if given.saves_asynchronously and given.save_every:
            hosted["checkpoint"] = sum(
                memory.parts[part] for memory in (device, host) for part in (MASTERS, OPTIMIZER, AVERAGE)
            )
    return StageMemory(held.index, parts, device.peak_moment, hosted, run.in_flight)


def engine_setting(given: PlanInput, held: HeldStage) -> EngineSetting:
    """Return what the engine's memory depends on besides the parameters."""
    layout, zero, precision = given.layout, zero_settings(given), given.engine.summary.precision
    shard = layout.data * layout.context
    return EngineSetting(
        zero=zero,
        precision=precision,
        shard_ranks=shard,
        expert_shard_ranks=shard * layout.tensor // given.expert_ranks,
        pipelined=layout.pipeline > 1,
        averages_weights=given.config.ema is not None,
        adds_in_products=given.machines.device_type == "cuda" and zero.bf16_sums,
        compiled_layers=compiled_layers(given),
        num_micro_batches=given.num_micro_batches,
        state_bytes=state_bytes_of(given, held),
        factor_bytes=factor_bytes_of(given, held),
        update_bytes=update_bytes_of(given, held, zero),
    )


def make_engine(
    held: HeldStage,
    setting: EngineSetting,
    device: Ledger,
    host: Ledger,
    rank: int,
    passes: Sequence[ModulePass],
) -> EngineMemory:
    """Return the memory of the optimizer that DeepSpeed takes for a stage of ZeRO and a precision.

    Args:
        held, setting, device, host: see `EngineMemory`.
        rank: index of the rank among those that share the states.
        passes: of modules in a micro-batch, at ZeRO-3.
    """
    if setting.zero.stage == 0:
        return PlainEngine(held, setting, device, host)
    if setting.zero.stage == 3:
        return DividedEngine(held, setting, device, host, passes)
    if setting.sums_all_gradients:
        return Bf16Engine(held, setting, device, host, rank)
    return FlatEngine(held, setting, device, host, rank)


def boundary_of(given: PlanInput, specs: Sequence[LayerSpec], first: int, last: int) -> Boundary:
    """Return what crosses the boundaries of the stage of the layers from `first` to `last`."""
    batch, hidden_bytes = given.config.micro_batch_size, given.core.shape().hidden_size * given.dtype.itemsize
    parts = given.layout.context * (given.layout.tensor if given.config.parallel.sequence else 1)
    lengths = {"decoder_input_ids": given.rows.target_length}

    def entering(index: int) -> int:
        positions = sum(lengths.get(column) or given.rows.seq_length for column in specs[index].hidden.values())
        return positions // parts * batch * hidden_bytes

    columns = [name for name in specs[first].columns if name in given.rows.columns]
    return Boundary(
        entering(first) if first else 0,
        entering(last) if last < len(specs) else 0,
        len(columns) * batch * given.rows.seq_length * INT64,
    )


def batch_bytes(given: PlanInput) -> int:
    """Return the bytes of a step's columns on a device, and of the places of their labels.

    On a CPU the columns are those that the data have loaded, and are not counted.
    """
    positions = given.num_micro_batches * given.config.micro_batch_size * given.rows.seq_length
    places = round(positions * given.rows.labelled) // given.layout.context * INT64
    return places + (0 if given.machines.device_type == "cpu" else len(given.rows.columns) * positions * INT64)


def device_allowances(given: PlanInput, tensors_bytes: int) -> dict[str, int]:
    """Return what a GPU's memory holds besides tensors, by part."""
    return allowances(sum(size > 1 for size in given.layout.values()) + (given.expert_ranks > 1), tensors_bytes)


def allowances(num_axes: int, tensors_bytes: int) -> dict[str, int]:
    """Return what a GPU's memory holds besides tensors, by part, with so many axes of several ranks."""
    return {
        "context": CONTEXT_BYTES,
        "communication": COMMUNICATION_BYTES * num_axes,
        "fragmentation": round(FRAGMENTATION * tensors_bytes),
    }
