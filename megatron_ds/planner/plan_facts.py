"""A plan as plain data, for `--json` and for programs. Units are part of the keys; docs/planning.md describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ds.planner.advice import Advice, describe_limit
from megatron_ds.planner.failures.fault_plan import FaultPlan, fault_facts
from megatron_ds.planner.memory.stage import StageMemory
from megatron_ds.planner.pipeline.stragglers import RandomSlowness
from megatron_ds.planner.plan import Campaign, Plan
from megatron_ds.planner.plan_values import strict
from megatron_ds.planner.traffic.wire import StepTraffic


def plan_facts(plan: Plan, campaign: Campaign | None, advice: Sequence[Advice], failures: FaultPlan) -> dict[str, Any]:
    """Return all numbers of a plan; those of a run that never makes progress are None, as JSON has no infinite ones.

    Args:
        plan: of the run.
        campaign: the complete training run; None = its length is unknown.
        advice: the changes that help most, the best first.
        failures: of the machines.
    """
    facts: dict[str, Any] = {
        "machines": _machines(plan),
        "layout": _layout(plan),
        "model": {"parameters": plan.size.num_params, "trained_parameters": plan.size.num_trained},
        "memory": {
            "limit_bytes": plan.limit_bytes,
            "peak_bytes": plan.fullest.peak_bytes,
            "fits": plan.fits,
            "stages": [_memory(one) for one in plan.memory],
        },
        "communication": [_traffic(stage, one) for stage, one in enumerate(plan.wire)],
        "step": _step(plan),
        "training": None if campaign is None else _campaign(campaign),
        "failures": fault_facts(failures),
        "limit": describe_limit(plan),
        "advice": [_advice(one) for one in advice],
    }
    return {name: strict(value) for name, value in facts.items()}


def _machines(plan: Plan) -> Mapping[str, Any]:
    machines = plan.given.machines
    return {
        "nodes": machines.nodes,
        "gpus_per_node": machines.ranks_per_node,
        "device": plan.device.name,
        "network": plan.network.name,
        "stragglers": None if plan.stragglers is None else _stragglers(plan.stragglers),
    }


def _stragglers(stragglers: RandomSlowness) -> Mapping[str, Any]:
    deviations = {"devices": stragglers.device_variance, "passes": stragglers.pass_variance}
    return {name: math.sqrt(variance) for name, variance in deviations.items()}


def _layout(plan: Plan) -> Mapping[str, Any]:
    given = plan.given
    return {
        "ranks": given.layout.world_size,
        **{axis: given.layout[axis] for axis in ("tensor", "pipeline", "context", "data")},
        "expert": given.expert_ranks,
        "sequence": given.config.parallel.sequence,
        "zero_stage": given.engine.summary.zero_stage,
        "precision": given.engine.summary.precision,
        "micro_batch_size": given.config.micro_batch_size,
        "micro_batches": given.num_micro_batches,
        "recompute": given.config.recompute,
    }


def _memory(stage: StageMemory) -> Mapping[str, Any]:
    return {
        "stage": stage.stage,
        "peak_bytes": stage.peak_bytes,
        "parts_bytes": dict(stage.parts),
        "when": stage.when,
        "host_bytes": stage.host_bytes,
        "host_parts_bytes": dict(stage.host_parts),
        "micro_batches_in_flight": stage.in_flight,
    }


def _traffic(stage: int, traffic: StepTraffic) -> Mapping[str, Any]:
    rows = [
        {"axis": axis, "kind": kind, "calls": sent.calls, "sent_bytes": float(sent.num_bytes)}
        for (axis, kind), sent in traffic.by_axis.items()
    ]
    return {"stage": stage, "sent_bytes": sum(row["sent_bytes"] for row in rows), "by_axis": rows}


def _step(plan: Plan) -> Mapping[str, Any]:
    time = plan.time
    return {
        "tokens": plan.given.tokens_per_step,
        "seconds": time.total_s,
        "parts_s": dict(time.parts),
        "tokens_per_s": time.tokens_per_s,
        "tokens_per_s_per_device": time.tokens_per_s / plan.given.machines.world_size,
        "mfu": time.mfu,
        "hfu": time.hfu,
    }


def _campaign(campaign: Campaign) -> Mapping[str, Any]:
    return {
        "tokens": campaign.tokens,
        "steps": campaign.steps,
        "seconds": campaign.seconds,
        "device_hours": campaign.device_hours,
        "price_per_device_hour": campaign.price,
        "cost": campaign.cost,
        "slowdown_by_failures": campaign.slowdown,
    }


def _advice(advice: Advice) -> Mapping[str, Any]:
    return {
        "changes": list(advice.changes),
        "step_s": advice.plan.time.total_s,
        "peak_bytes": advice.plan.fullest.peak_bytes,
    }
