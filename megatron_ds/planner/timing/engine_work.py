"""The work of a step of this package's engine, from a plan's input: passes, engine traffic, updates, checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_ds.planner.held_parameters import (
    HeldParameter,
    HeldStage,
    compiled_layers,
    hold_stage,
    num_elements,
)
from megatron_ds.planner.moments import Event, Moment
from megatron_ds.planner.operations import (
    Collective,
    HostCopy,
    LayerTrace,
    Message,
    ModuleHooks,
    Operation,
    Stream,
    Work,
)
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.timing.pass_time import Machine
from megatron_ds.planner.timing.placement import Placement, place
from megatron_ds.planner.timing.step_work import EndWork, StageWork, StepWork
from megatron_ds.planner.traffic.engine import EngineTraffic, engine_traffic
from megatron_ds.planner.traffic.gradients import shard_ranks
from megatron_ds.planner.traffic.zero3 import HPZ
from megatron_ds.planner.zero_settings import ZeroSettings, zero_settings

FP32 = 4
MOMENT_BYTES: Mapping[str, int] = {"adamw": 8, "lion": 4, "muon": 4, "sgd": 4, "adamw8bit": 2, "adafactor": 1}
"""Bytes of optimizer state of an element, without its fp32 weight; other optimizers count as adamw."""
HOST_UPDATES_PER_S = 1.2e9
"""Elements that CPU-Adam updates in a second for one device: 10^10 on all cores of a node of eight (Ren et al. 2021,
"ZeRO-Offload", table 4)."""


def machine_of(given: PlanInput, device: Device, network: Network) -> Machine:
    """Return a device of a run among the others."""
    layout = given.layout
    placed = place(layout, network.island, given.expert_ranks, given.engine.context.ulysses)
    stages = placed["pipeline"]
    tied = Placement(2, min(2, stages.islands), stages.per_island if stages.islands == 1 else 1)
    model = Placement(layout.pipeline * layout.tensor, stages.islands, max(1, stages.per_island * layout.tensor))
    second = Placement.of(range(max(1, given.engine.summary.hpz_partition_size)), network.island)
    return Machine(device, network, {"tied": tied, "model": model, "host": placed["world"], HPZ: second, **placed})


def step_of(given: PlanInput, traces: Sequence[LayerTrace], held: Mapping[int, HeldStage] | None = None) -> StepWork:
    """Return the work of a step.

    Args:
        given: the run.
        traces: of all layers of the model, in order, for one micro-batch.
        held: index of a stage -> its parameters; missing ones are found by `hold_stage`.
    """
    bounds, zero, layout = given.stage_bounds, zero_settings(given), given.layout
    traces = _with_hooks(traces) if zero.stage == 3 else traces
    last = layout.pipeline - 1
    known = dict(held or {})
    for stage in {0, last // 2, last} - set(known):  # others are like the one in the middle
        known[stage] = hold_stage(given, stage)
    stages, compiled = [], compiled_layers(given)
    for stage, (first, end) in enumerate(pairwise(bounds)):
        sends = Work({Message("pipeline", traces[end - 1].output_bytes): 1}) if stage < last else Work()
        trained = known.get(stage, known[last // 2]).trained
        stages.append(StageWork(traces[first:end], _gradients(given, zero, trained, compiled), sends))
    ends = {stage: _end(given, zero, one, traces) for stage, one in sorted(known.items())}
    return StepWork(
        stages,
        ends,
        layout.pipeline,
        given.num_micro_batches,
        given.tokens_per_step,
        layout.world_size,
        nodes=given.machines.nodes,
        saved=_saved(given, known),
        save_every=given.save_every or 1,
        dtype=str(given.dtype).removeprefix("torch."),
    )


def _with_hooks(traces: Sequence[LayerTrace]) -> list[LayerTrace]:
    """Return traces with DeepSpeed's hooks of their modules; equal layers still share one."""
    known: dict[int, LayerTrace] = {}
    for trace in traces:
        if id(trace) not in known:
            forward, backward = (
                work + Work({ModuleHooks(): sum(_begins(moment) for moment in moments)})
                for work, moments in ((trace.forward, trace.in_forward), (trace.backward, trace.in_backward))
            )
            known[id(trace)] = replace(trace, forward=forward, backward=backward)
    return [known[id(trace)] for trace in traces]


def _begins(moment: Moment) -> bool:
    return moment.module_pass is not None and moment.module_pass.event == Event.BEFORE


def _gradients(
    given: PlanInput, zero: ZeroSettings, trained: Sequence[HeldParameter], compiled: Collection[int]
) -> Work:
    """Return what a micro-batch does with the gradients of a stage after their products: additions, or copies.

    On a GPU products add them up. Those of compiled layers do not: their gradients are cast, and the copies added.
    """
    if zero.bf16_sums and given.machines.device_type == "cuda":
        apart = [one for one in trained if not one.is_added_in_products(compiled)]
        added = num_elements(apart)
        cast = Stream(added * (zero.element_bytes + FP32), launches=len(apart))
        return Work({cast: 1, Stream(3 * added * FP32, len(apart), "add_"): 1}) if apart else Work()
    if given.num_micro_batches == 1 and zero.stage < 2 and not zero.bf16_sums:
        return Work()
    sums = FP32 if zero.bf16_sums else zero.element_bytes
    return Work({Stream(num_elements(trained) * (zero.element_bytes + 2 * sums), launches=4): 1})


def _end(given: PlanInput, zero: ZeroSettings, held: HeldStage, traces: Sequence[LayerTrace]) -> EndWork:
    traffic = engine_traffic(given, held.index, held, traces=traces if zero.stage == 3 else None)
    hidden, hiding = _hidden(traffic, zero), 1
    if zero.stage >= 2:
        hiding = given.num_micro_batches
    update, host_s = _update(given, zero, held)
    update += _copies(given, zero, held) + _joined_weights(traffic.weights if zero.stage == 3 else Work())
    sent = hidden + traffic.norms + traffic.losses + traffic.optimizer.slowest
    return EndWork(sent, hiding, update + traffic.optimizer.products, host_s)


def _hidden(traffic: EngineTraffic, zero: ZeroSettings) -> Work:
    """Return the traffic of gradients and weights; what DeepSpeed begins while passes compute is hidden.

    Stage 3 fetches weights before they are needed. Gradients are reduced during the backward pass at stages 2 and 3
    where `overlap_comm` is on.
    """
    gradients = _marked(traffic.gradients, zero.stage >= 2 and zero.overlap_comm)
    return gradients + _marked(traffic.weights, zero.stage == 3)


def _marked(work: Work, hidden: bool) -> Work:
    return Work({_mark(one, hidden): count for one, count in work.items()})


def _mark(one: Operation, hidden: bool) -> Operation:
    return replace(one, hidden=hidden) if isinstance(one, Collective | Message) else one


def _update(given: PlanInput, zero: ZeroSettings, held: HeldStage) -> tuple[Work, float]:
    """Return the streams and copies of norms and of the optimizer, and the seconds in which the host updates.

    An optimizer reads and writes fp32 weights and its state, reads fp32 gradients, and writes weights; the norm reads
    the gradients, and their scale is a factor of the update. Of an offloaded optimizer gradients go to the host, and
    weights come back.
    """
    section = given.config.optimizer
    state = MOMENT_BYTES.get(section.name if section is not None else "adamw", MOMENT_BYTES["adamw"])
    weight = 0 if zero.element_bytes == FP32 else zero.element_bytes
    streams, host_s = Work(), 0.0
    for apart in (False, True):
        number = sum(one.numel for one in held.trained if one.apart == apart)
        part = number // shard_ranks(given, apart=apart) if zero.stage else number
        if not number:
            continue
        streams[Stream(FP32 * (part if zero.stage >= 2 else number), name="norm")] += 1
        if zero.offloads_optimizer:
            host_s += part / HOST_UPDATES_PER_S
            streams[HostCopy(part * FP32, to_host=True, hidden=False)] += 1
            streams[HostCopy(part * zero.element_bytes, to_host=False, hidden=False)] += 1
        else:
            streams[Stream(part * (2 * FP32 + 2 * state + FP32 + weight), name=section.name if section else "")] += 1
    return streams, host_s


def _copies(given: PlanInput, zero: ZeroSettings, held: HeldStage) -> Work:
    """Return what DeepSpeed 0.19.8 does in memory at ZeRO-1 to 3 besides the optimizer, in a step.

    Gradients are copied into a bucket and divided by the number of ranks; stage 3 joins them by the rank that they go
    to. A rank's part of them is joined into one tensor and scaled, and its updated weights are copied. Where products
    add gradients to fp32 sums there are no buckets.
    """
    found = Work()
    if not zero.stage or zero.offloads_optimizer:
        return found
    buckets = 0 if zero.bf16_sums else given.num_micro_batches if zero.stage >= 2 else 1
    for apart in (False, True):
        number = sum(one.numel for one in held.trained if one.apart == apart)
        part = number // shard_ranks(given, apart=apart)
        if not number:
            continue
        whole = 2 * zero.element_bytes * number
        found += Work({Stream(whole, name="copy_"): buckets, Stream(whole, name="div_"): buckets})
        if zero.stage == 3:
            found[Stream(whole, name="cat")] += buckets
        found[Stream(2 * zero.element_bytes * part, name="cat")] += 1
        found[Stream(2 * FP32 * part, name="mul_")] += 1
        if zero.element_bytes == FP32:  # others are written by the update
            found[Stream(2 * FP32 * part, name="copy_")] += 1
    return Work({one: count for one, count in found.items() if count})


def _joined_weights(gathers: Work) -> Work:
    """Return the copies by which the parts of gathered weights are joined, rank by rank."""
    return Work(
        {
            Stream(2 * one.num_bytes, name="cat"): count
            for one, count in gathers.items()
            if isinstance(one, Collective) and one.kind == "all_gather"
        }
    )


def _saved(given: PlanInput, held: Mapping[int, HeldStage]) -> Work:
    """Return the copies of a checkpoint that a step waits for: of a rank's part of the state to the host."""
    if not given.save_every:
        return Work()
    shards = shard_ranks(given, apart=False)
    most = max(sum(one.numel for one in stage.parameters) for stage in held.values())
    return Work({HostCopy(most * (FP32 + MOMENT_BYTES["adamw"]) // shards, to_host=True, hidden=False): 1})
