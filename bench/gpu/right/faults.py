"""Checks for faulty devices, on a device without a fault: passes that repeat, checksums, products, times of waits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.record import guarded, record, torch_device
from bench.gpu.right.small_runs import LR, Setting, build, global_batch
from megatron_ds.engine import RepeatedPass, stop_distributed
from megatron_ds.engine.replica_checksums import Checksums
from megatron_ds.parallel.communication_time import CommunicationClock
from megatron_ds.parallel.launch import RankInfo, run_local
from megatron_ds.training.device_test import DTYPES, wrong_products

SETTINGS = {"bf16 zero1": Setting("bf16", 1), "fp32 zero0": Setting("fp32", 0)}


def check_faults() -> None:
    """Check each setting in a forked rank."""
    for name, setting in SETTINGS.items():
        guarded("faults", name, partial(_run, name, setting))


def _run(name: str, setting: Setting) -> None:
    (found,) = run_local(lambda info: _examine(info, setting), 1, timeout_s=90.0)
    record("faults", name, not (found["by_norms"] or found["products"]) and found["flip_found"], **found)


def _examine(info: RankInfo, setting: Setting) -> dict[str, Any]:
    """Return the gradients that differ between two passes, by norms and by bits, and the other results."""
    model = build(info, setting)
    batches = model.split(global_batch(0))
    model.train_step(batches, LR)
    by_norms = RepeatedPass(model.engine, is_exact=False).differing(batches[0])
    by_bits = RepeatedPass(model.engine, is_exact=True).differing(batches[0])
    clock, x = CommunicationClock(model.device), torch.ones(2**20, device=model.device)
    with clock.measuring():
        dist.all_reduce(x)
    checksums = Checksums()
    before = checksums.on_host([x])
    x[5] = 2.0
    found = {
        "by_norms": ", ".join(by_norms[:4]),
        "differing_bits": len(by_bits),
        "products": "; ".join(filter(None, (wrong_products(dtype, torch_device()) for dtype in DTYPES))),
        "flip_found": checksums.on_host([x]) != before,
        "all_reduce_ms": clock.take() * 1e3,
    }
    stop_distributed()
    return found
