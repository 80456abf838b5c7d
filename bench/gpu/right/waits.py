"""Number of times that a step waits for the device, by torch's synchronisation debug mode, and the lines that do."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch

from bench.gpu.host_waits import host_waits
from bench.gpu.record import DEVICE, guarded, record, wait_for_turn
from bench.gpu.right.faults import check_faults
from bench.gpu.right.small_runs import BATCH, LR, Setting, build, global_batch
from megatron_ds.engine import preload, stop_distributed
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.launch import RankInfo, run_local

WARM_UPS, STEPS = 3, 4
TARGET = 2.0  # synchronisations of a step with one data rank
NUM_LINES = 6

SETTINGS = {
    "bf16 zero1, 1 micro-batch": Setting("bf16", 1, engine={"micro_batch_size": BATCH}),
    "bf16 zero1, 4 micro-batches": Setting("bf16", 1, engine={"micro_batch_size": BATCH // 4}),
    "bf16 zero1, packed": Setting("bf16", 1, packed=True),
    "bf16 zero1, experts": Setting("bf16", 1, experts=True),
    "bf16 zero3": Setting("bf16", 3),
    "fp16 zero1": Setting("fp16", 1),
    "fp32 zero0": Setting("fp32", 0),
}


def main() -> None:
    """Count for each setting; the target holds for ZeRO-0 and 1 in fp32 and bf16."""
    quiet_libraries()
    preload()
    for name, setting in SETTINGS.items():
        guarded("waits", name, partial(_run, name, setting))
    check_faults()


def _run(name: str, setting: Setting) -> None:
    if DEVICE != "cuda":
        record("waits", name, None, skipped="a CPU is not waited for")
        return
    (lines,) = run_local(lambda info: _count(info, setting), 1, timeout_s=60.0)
    waits = sum(lines.values()) / STEPS
    judged = setting.zero <= 1 and setting.precision != "fp16"
    most = ", ".join(f"{count / STEPS:g} x {line}" for line, count in Counter(lines).most_common(NUM_LINES))
    record("waits", name, waits <= TARGET if judged else None, waits_per_step=waits, lines=most)


def _count(info: RankInfo, setting: Setting) -> dict[str, int]:
    """Return the number of synchronisations in `STEPS` steps by line of code."""
    engine = build(info, setting)
    batches = engine.split(global_batch(0, setting.packed))
    for _ in range(WARM_UPS):
        engine.train_step(batches, LR)
    torch.cuda.synchronize()
    lines = host_waits(lambda: [engine.train_step(batches, LR) for _ in range(STEPS)])
    stop_distributed()
    return dict(lines)


if __name__ == "__main__":
    wait_for_turn()
    main()
