"""Times of the host: to start an operation, and for DeepSpeed's hooks of a module's pass at ZeRO-3.

Steps of a model are measured whose tensors are so small that hardly anything is computed, with few and with many
blocks. The difference is the time of blocks alone. What the profile knows of their operations and their communication
is subtracted, and the rest is divided by the number of operations that the planner's trace of the same blocks has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.planner.input_of_config import input_of
from megatron_ds.planner.operations import ModuleHooks, Work
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import find_network
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.link import US
from megatron_ds.planner.timing.engine_work import step_of
from megatron_ds.planner.timing.pass_time import num_launches
from megatron_ds.planner.timing.step_time import plan_time
from megatron_ds.planner.trace import trace_layers
from megatron_ds.runtime.loaded_model import load_model
from megatron_ds.runtime.process_session import Session

WARM_UPS, STEPS = 3, 9
FEW, MANY = 2, 10
"""Blocks of the models that are measured."""
_LENGTH = 8
_MODEL: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _LENGTH,
    "tie_word_embeddings": False,
}
STAGES = (0, 3)
"""ZeRO stages at which steps are measured: without hooks, and with them."""


def measure_blocks(info: RankInfo, device: torch.device) -> dict[int, float]:
    """Return the seconds of further blocks by ZeRO stage. Collective over the world, whose ranks are data ranks."""
    found = {}
    for stage in STAGES:
        few_s, many_s = (_step_s(Session(info, device), stage, blocks) for blocks in (FEW, MANY))
        found[stage] = max(0.0, many_s - few_s)
    return found


def with_host_times(device: Device, blocks_s: Mapping[int, float], ranks: int) -> Device:
    """Return a profile with the times of its host.

    Args:
        device: a profile without them.
        blocks_s: from `measure_blocks`.
        ranks: that were measured.
    """
    fields: dict[str, float] = {}
    for stage in STAGES:
        known = device.model_copy(update=fields)
        given = {blocks: _input(stage, blocks, ranks) for blocks in (FEW, MANY)}
        planned = {
            blocks: plan_time(one, known, find_network(None, known, ranks)).total_s for blocks, one in given.items()
        }
        work = _work(given[MANY]) + Work({one: -count for one, count in _work(given[FEW]).items()})
        rest_s = max(0.0, blocks_s[stage] - (planned[MANY] - planned[FEW]))
        name, number = ("hook_us", work[ModuleHooks()]) if stage == 3 else ("host_us", num_launches(work))
        fields[name] = float(f"{rest_s / number / US:.4g}")
    return device.model_copy(update=fields)


def _engine_fields(stage: int, ranks: int) -> dict[str, Any]:
    return {
        "parallel": {},
        "deepspeed": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": False}},
        "optimizer": {"lr": 1e-4, "grad_clip": 1.0},
        "global_batch_size": ranks,
        "micro_batch_size": 1,
    }


def _step_s(session: Session, stage: int, blocks: int) -> float:
    """Return the lower quartile of a step's seconds on this rank."""
    model = load_model({**_MODEL, "num_hidden_layers": blocks})
    engine = session.build_engine(model, **_engine_fields(stage, session.world_size))
    ids = torch.ones(session.world_size, _LENGTH, dtype=torch.int64)
    batches = engine.split({"input_ids": ids, "targets": ids})
    times_s = []
    for _ in range(WARM_UPS + STEPS):
        began_s = time.perf_counter()
        engine.train_step(batches, 1e-4)
        times_s.append(time.perf_counter() - began_s)
    return statistics.quantiles(times_s[WARM_UPS:], n=4)[0]


def _input(stage: int, blocks: int, ranks: int) -> PlanInput:
    """Return the input of a plan of the same steps."""
    model = {**_MODEL, "num_hidden_layers": blocks}
    return input_of(model, _engine_fields(stage, ranks), Rows(_LENGTH), Machines(1, ranks, "cpu"))


def _work(given: PlanInput) -> Work:
    """Return the passes of all layers."""
    found = Work()
    for trace in step_of(given, trace_layers(given.layers, given.trace_setting())).stages[0].layers:
        found += trace.forward + trace.backward
    return found
