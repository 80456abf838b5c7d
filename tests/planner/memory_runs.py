"""Memory of a run as it is planned, and as live storages are counted on ranks that train."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_ds.layers.moe.router import Router
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.planner.memory.stage import StageMemory, plan_memory
from megatron_ds.planner.trace import trace_layers
from megatron_ds.planner.trace.storages import LiveStorages
from megatron_ds.runtime import Session
from tests.planner.memory_cases import MemoryCase
from tests.ranks import rank_device, run_alone, run_ranks

STEPS = 2  # buffers that a first step leaves behind are there in the second


@dataclass(frozen=True)
class Compared:
    """The rank of a pipeline stage that needs most memory.

    Attributes:
        planned: the plan.
        measured_bytes: the peak of live storages in the last step, with tokens routed evenly to experts.
    """

    planned: StageMemory
    measured_bytes: int

    @property
    def error(self) -> float:
        """How much too much is planned, as a share of what was measured."""
        return self.planned.peak_bytes / self.measured_bytes - 1


def plan(case: MemoryCase) -> list[StageMemory]:
    """Return the plan of each pipeline stage."""
    given = case.plan_input()
    traces = trace_layers(given.layers, given.trace_setting())
    return [plan_memory(given, traces, stage) for stage in range(case.pipeline)]


def _choose_evenly(router: Router, scores: Tensor) -> Tensor:
    """Choose all experts in turn, as plans take it: (T, E) -> (T, k)."""
    tokens, experts = scores.shape
    return torch.arange(tokens * router.shape.top_k).view(tokens, -1) % experts


def measure(info: RankInfo, case: MemoryCase) -> tuple[int, int]:
    """Return a rank's pipeline stage, and the peak of its live storages in the last step."""
    torch.set_num_threads(1)
    batch = case.batch()
    with (
        patch.object(Router, "_choose", _choose_evenly),
        LiveStorages("cpu") as live,
        counting_compiled_code(live),
    ):
        engine = Session(info, rank_device()).build_engine(case.load(), case.config)
        for _ in range(STEPS):
            batches = engine.split(batch)
            gc.collect()
            live.reset_peak()
            engine.engine.train_step(batches, 1e-4)
    return engine.grid.coords.pipeline, live.peak_bytes


@contextmanager
def counting_compiled_code(live: LiveStorages) -> Iterator[None]:
    """Have what compiled code allocates count: it calls a function of C++ that no mode sees."""
    allocate = torch._C._dynamo.guards._empty_strided_cpu

    def counted(*args: Any) -> Tensor:
        found: Tensor = allocate(*args)
        live.add(found)
        return found

    with patch.object(torch._C._dynamo.guards, "_empty_strided_cpu", counted):
        yield


def compare(case: MemoryCase) -> Sequence[Compared]:
    """Return the comparison of each pipeline stage."""
    with TemporaryDirectory() as directory:
        if case.peft is not None:
            run_alone(case.save, directory)
            case = replace(case, directory=directory)
        return _compared(case)


def _compared(case: MemoryCase) -> Sequence[Compared]:
    planned = run_alone(plan, case)
    timeout_s = 600.0 if case.config.compile else 120.0
    peaks = run_ranks(measure, case.world_size, case, timeout_s=timeout_s)
    return [Compared(one, max(peak for number, peak in peaks if number == stage)) for stage, one in enumerate(planned)]
