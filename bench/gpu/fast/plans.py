"""Plans against what this device needs: the memory of a step by torch's allocator, and its time by the device's table.

The time is planned with the table that the part `device-table` measured in the same run, or else with the profile that
comes with the package for this GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

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
    release_memory,
    reset_peak,
    time_runs,
    wait_for_turn,
)
from bench.ours import columns, engine_fields
from bench.work import MASK_EVERY, MASKED_MODELS, Spec, Work
from megatron_ds.engine import preload
from megatron_ds.planner.memory.stage import ALLOWANCES, StageMemory
from megatron_ds.planner.plan import make_plan
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import Device, find_by_gpu, find_device, find_network
from megatron_ds.runtime import session
from tests.planner.inputs import input_of

WARM_UPS, STEPS = 2, pick(4, 1)
MOST_UNDER, MOST_OVER = 0.02, 0.05
"""How much less or more memory may be planned than is needed."""
GB = 1e9

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

    def plan_input(self) -> PlanInput:
        """Return what its plan is made from."""
        masked = self.work.model["model_type"] in MASKED_MODELS
        rows = Rows(self.work.seq_length, labelled=1 / MASK_EVERY if masked else 1.0)
        return input_of(self.work.model, self.engine, rows, Machines(1, 1, "cuda" if DEVICE == "cuda" else "cpu"))


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
def _device() -> Device:
    """Return the profile of this device."""
    measured = sorted(OUT.glob("*.measured.yaml"))
    if measured:
        return find_device(str(measured[-1]))
    if DEVICE == "cpu":
        return find_device("cpu")
    found = find_by_gpu(torch.cuda.get_device_name(0))
    assert found is not None, "no profile comes with the package for this GPU"
    return found


def compare(name: str, case: Case) -> None:
    """Plan and measure a case, and record both."""
    device = _device()
    plan = make_plan(case.plan_input(), device, find_network(None, device, 1))
    ms, allocated, reserved, used = _measure(case)
    tensors = tensors_bytes(plan.fullest)
    error = tensors / allocated - 1 if allocated else None
    record(
        PLANNED,
        name,
        None if error is None else -MOST_UNDER <= error <= MOST_OVER,
        planned_gb=round(tensors / GB, 3),
        **({} if error is None else {"measured_gb": round(allocated / GB, 3), "memory_error": round(error, 4)}),
        planned_ms=round(plan.time.total_s * 1e3, 2),
        measured_ms=ms,
        time_error=round(plan.time.total_s * 1e3 / ms - 1, 4),
        reserved_gb=round(reserved / GB, 3),
        device_gb=round(used / GB, 3),
        planned_device_gb=round(plan.fullest.peak_bytes / GB, 3),
        when=plan.fullest.when,
        parts={part: round(size / GB, 3) for part, size in plan.fullest.parts.items()},
    )


def tensors_bytes(memory: StageMemory) -> int:
    """Return the bytes of a plan's tensors, without what the device has besides."""
    return sum(size for part, size in memory.parts.items() if part not in ALLOWANCES)


def _measure(case: Case) -> tuple[float, int, int, int]:
    """Return the milliseconds of a step, its peaks of allocated and reserved bytes, and the bytes in use after it."""
    with session() as here:
        engine = here.build_engine(drawn_model(case.work.model, here.device), **case.engine)
        step = steps_on(engine, columns(case.work), case.work.lr)
        step()
        release_memory()
        reset_peak()
        ms = time_runs(step, warm_ups=WARM_UPS, times=STEPS).ms
        if DEVICE == "cpu":
            return ms, 0, 0, 0
        free, total = torch.cuda.mem_get_info()
        return ms, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free


if __name__ == "__main__":
    preload()
    wait_for_turn()
    main()
