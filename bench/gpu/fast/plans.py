"""Plans against what this device needs: the memory of a step by torch's allocator, and its time by the device's table.

The time is planned with the table that the part `device-table` measured in the same run, or else with the profile that
comes with the package for this GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch

from bench.gpu.fast import models
from bench.gpu.fast.targets import PLANNED
from bench.gpu.fast.train import steps_on
from bench.gpu.fast.weights import drawn_model
from bench.gpu.record import (
    DEVICE,
    OUT,
    guarded,
    pick,
    record,
    reset_peak,
    time_runs,
    wait_for_turn,
)
from bench.ours import columns, engine_fields
from bench.work import MASK_EVERY, MASKED_MODELS, Spec, Work
from megatron_ds.engine import preload, start_distributed, stop_distributed
from megatron_ds.parallel.launch import RankInfo, run_local
from megatron_ds.planner.input_of_config import input_of
from megatron_ds.planner.memory.stage import ALLOWANCES, StageMemory
from megatron_ds.planner.plan import make_plan
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import Device, find_by_gpu, find_device, find_network
from megatron_ds.runtime import Session

WARM_UPS, STEPS = 2, pick(4, 1)
MOST_UNDER, MOST_OVER = 0.02, 0.05
"""How much less or more memory may be planned than is needed."""
GB = 1e9
TIMEOUT_S = 60.0

SHORT = models.work({**models.LLAMA_1B, "num_hidden_layers": 8}, 4, 2048)
LLAMA = replace(SHORT, batch=pick(8, 2))
MIXTURE = models.work({**models.QWEN3_MOE, "num_hidden_layers": 2}, 2, 4096)
LONG_SEQUENCES = {"recompute": "full", "offload_activations": True, "mlp_tile_tokens": pick(2048, 8)}


@dataclass(frozen=True)
class Case:
    """A run that is planned and measured on one GPU.

    Attributes:
        work: model and batch.
        zero: stage of ZeRO.
        micro_batch: samples of a micro-batch; 0 = all of the batch.
        fields: further fields of the engine's config.
    """

    work: Work = LLAMA
    zero: int = 1
    micro_batch: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> dict[str, Any]:
        """Fields of the engine's config."""
        options = {"zero": self.zero, "micro_batch": self.micro_batch or self.work.batch}
        return {**engine_fields(Spec("ours", 1, options, self.work, "", DEVICE)), **self.fields}

    def plan_input(self, device_type: Literal["cpu", "cuda"]) -> PlanInput:
        """Return what its plan is made from, on a device of torch's name."""
        masked = self.work.model["model_type"] in MASKED_MODELS
        rows = Rows(self.work.seq_length, labelled=1 / MASK_EVERY if masked else 1.0)
        return input_of(self.work.model, self.engine, rows, Machines(1, 1, device_type))


CASES = {
    "ZeRO-1": Case(micro_batch=pick(4, 1)),
    "ZeRO-1, fp32": Case(replace(SHORT, dtype="fp32")),
    "ZeRO-1, one micro-batch": Case(SHORT),
    "ZeRO-2": Case(zero=2, micro_batch=pick(4, 1)),
    "ZeRO-3": Case(zero=3, micro_batch=pick(4, 1)),
    "recompute full": Case(fields={"recompute": "full"}),
    "recompute selective": Case(SHORT, fields={"recompute": "selective"}),
    "recompute full, attention kept": Case(fields={"recompute": "full", "keep_attention": True}),
    "recompute full, inputs in host memory, MLP in tiles": Case(fields=LONG_SEQUENCES),
    "1.2 B Llama": Case(models.LLAMA),
    "2 layers of Qwen3-30B-A3B": Case(MIXTURE),
    "BERT large": Case(models.BERT),
}


def main() -> None:
    """Plan and measure each case."""
    for name, case in CASES.items():
        guarded(PLANNED, name, partial(compare, name, case))


@cache
def _device(gpu: str | None) -> Device:
    """Return the profile of this device, by the name of its GPU."""
    measured = sorted(OUT.glob("*.measured.yaml"))
    if measured:
        return find_device(str(measured[-1]))
    found = find_device("cpu") if gpu is None else find_by_gpu(gpu)
    assert found is not None, f"no profile comes with the package for {gpu}"
    return found


def compare(name: str, case: Case) -> None:
    """Plan and measure a case, and record both."""
    (found,) = run_local(lambda info: _measure(info, case), 1, TIMEOUT_S)
    device = _device(found.gpu)
    plan = make_plan(case.plan_input("cpu" if found.gpu is None else "cuda"), device, find_network(None, device, 1))
    tensors = tensors_bytes(plan.fullest)
    error = tensors / found.allocated - 1 if found.allocated else None
    record(
        PLANNED,
        name,
        None if error is None else -MOST_UNDER <= error <= MOST_OVER,
        planned_gb=round(tensors / GB, 3),
        **({} if error is None else {"measured_gb": round(found.allocated / GB, 3), "memory_error": round(error, 4)}),
        planned_ms=round(plan.time.total_s * 1e3, 2),
        measured_ms=found.ms,
        time_error=round(plan.time.total_s * 1e3 / found.ms - 1, 4),
        reserved_gb=round(found.reserved / GB, 3),
        device_gb=round(found.in_use / GB, 3),
        planned_device_gb=round(plan.fullest.peak_bytes / GB, 3),
        when=plan.fullest.when,
        parts={part: round(size / GB, 3) for part, size in plan.fullest.parts.items()},
    )


def tensors_bytes(memory: StageMemory) -> int:
    """Return the bytes of a plan's tensors, without what the device has besides."""
    return sum(size for part, size in memory.parts.items() if part not in ALLOWANCES)


class Measured(NamedTuple):
    """Milliseconds of a step; a GPU's name, the peaks of allocated and reserved bytes, and those in use after it."""

    ms: float
    gpu: str | None = None
    allocated: int = 0
    reserved: int = 0
    in_use: int = 0


def _measure(info: RankInfo, case: Case) -> Measured:
    """Measure a case in a process of its own: DeepSpeed keeps memory of engines that are gone."""
    device = start_distributed(info)
    engine = Session(info, device).build_engine(drawn_model(case.work.model, device), **case.engine)
    step = steps_on(engine, columns(case.work), case.work.lr)
    step()
    torch.cuda.empty_cache()
    reset_peak()
    ms = time_runs(step, warm_ups=WARM_UPS, times=STEPS).ms
    found = Measured(ms)
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found = Measured(ms, torch.cuda.get_device_name(device), *peaks, total - free)
    stop_distributed()
    return found


if __name__ == "__main__":
    preload()
    wait_for_turn()
    main()
