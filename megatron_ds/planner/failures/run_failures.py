"""Failures of a planned run: the cost of its checkpoints, and the plan of its failures."""

from __future__ import annotations

from megatron_ds.planner.failures.closed_forms import Faults, Saving
from megatron_ds.planner.failures.fault_plan import FaultPlan, estimate_saving, plan_faults
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles import Device
from megatron_ds.planner.timing.engine_work import FP32, MOMENT_BYTES
from megatron_ds.planner.timing.step_time import StepTime


def saving_of(given: PlanInput, num_trained: int, device: Device) -> Saving:
    """Estimate the cost of a run's checkpoints: fp32 weights and optimizer state, divided over all ranks.

    Args:
        given: the run.
        num_trained: parameters that it trains.
        device: profile of its devices.
    """
    section = given.config.optimizer
    name = section.name if section is not None else "adamw"
    total_bytes = num_trained * (FP32 + MOMENT_BYTES.get(name, MOMENT_BYTES["adamw"]))
    rank_bytes = total_bytes / given.layout.world_size
    nodes, asynchronous = given.machines.nodes, given.saves_asynchronously
    return estimate_saving(rank_bytes, total_bytes, nodes, asynchronous, device.host_gb_s)


def plan_run_failures(
    given: PlanInput,
    time: StepTime,
    num_trained: int,
    faults: Faults,
    device: Device,
    saving: Saving | None = None,
) -> FaultPlan:
    """Plan the failures of a run.

    Args:
        given: the run.
        time: of a step, with the stragglers of its devices.
        num_trained: parameters that it trains.
        faults: rates and costs of failures; their number of nodes is the run's.
        device: profile of its devices.
        saving: measured cost of a checkpoint; None = it is estimated.
    """
    cost = saving if saving is not None else saving_of(given, num_trained, device)
    return plan_faults(faults, cost, time.total_s - time.pause_s, given.save_every or None)
