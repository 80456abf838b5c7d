"""Figures of a training step or an operation: speed, fraction of the limits, peak memory, agreement of losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any

from bench.gemm import device_peak
from bench.gpu.judgement import Figure
from bench.gpu.record import (
    DEVICE,
    RESULTS,
    peak_gb,
    pick,
    record,
    release_memory,
    reset_peak,
    time_runs,
)
from bench.gpu.report import read_rows
from megatron_ds.hf.config import HFModel

CEILING = Figure("matrix products", "ceiling", "tflops")
FIRST_LOSS, LATER_LOSS = 1e-2, 5e-2
"""Largest differences of the losses of contestants, relative to the first loss: rounding of bf16 at first; later,
weights in bf16 without fp32 masters lose small updates. In ten steps a batch is learned by heart, down to a thousandth.
"""


def recorded(figure: Figure) -> float | None:
    """Return a figure that an earlier part of this run has recorded."""
    return figure.find(read_rows(RESULTS)) if RESULTS.is_file() else None


def limits(flops: float, seconds: float) -> dict[str, float]:
    """Return the TFLOP/s, and their fractions of the measured matrix products and of the data sheet, as far as known.

    Args:
        flops: floating-point operations.
        seconds: their time.
    """
    tflops = flops / seconds / 1e12
    ceiling, peak = recorded(CEILING), device_peak(DEVICE)
    found = {"tflops": float(f"{tflops:.4g}")}
    if ceiling:
        found["of_products"] = round(tflops / ceiling, 4)
    if peak:
        found["mfu"] = round(tflops * 1e12 / peak, 4)
    return found


def flops_per_token(model: HFModel, seq_length: int, num_params_frozen: int = 0) -> float:
    """Return the FLOPs of one position, forward and backward, as a run's MFU counts them.

    Attention is counted in full, causal or not (Chowdhery et al. 2022), and the embedding table is not counted.
    """
    num_params = sum(prod(row.op.native_shape(model.axis_sizes)) for row in model.table.values())
    return model.core.flops_per_position(seq_length, 0, num_params - model.core.num_idle_params, num_params_frozen)


def block_flops_per_token(model: HFModel, seq_length: int) -> float:
    """Return the FLOPs of one position in the blocks alone, forward and backward; see `flops_per_token`."""
    rows = {name: row for name, row in model.table.items() if name.startswith(tuple(model.core.stacks))}
    num_params = sum(prod(row.op.native_shape(model.axis_sizes)) for row in rows.values())
    num_params -= model.core.num_expert_params_idle
    return sum(stack.flops_per_token(num_params, 0, seq_length) for stack in model.core.stacks.values())


def measure_steps(
    section: str,
    name: str,
    step: Callable[[], float],
    tokens: int,
    flops: float,
    *,
    times: int = 8,
    warm_ups: int = 3,
    same_work: bool = True,
    **found: Any,
) -> None:
    """Time a contestant's training step and record it; its losses must be those of the section's first contestant.

    The peak memory is that since `reset_peak`, so it includes the construction of the contestant.

    Args:
        section, name: the case and the contestant.
        step: does a step and returns its loss.
        tokens: tokens of a step.
        flops: FLOPs of a step.
        times: number of timed steps.
        warm_ups: number of steps before them.
        same_work: its losses must be those of the others.
        found: other facts to record.
    """
    losses: list[float] = []
    timing = time_runs(lambda: losses.append(step()), warm_ups=pick(warm_ups, 1), times=pick(times, 2), budget_s=8.0)
    agree, first = _agreement(section, losses) if same_work else (all(map(math.isfinite, losses)), "a finite loss")
    record(
        section,
        name,
        agree,
        tokens_s=round(tokens / timing.median_s),
        ms=timing.ms,
        slowest=f"+{timing.spread:.0%}",
        **limits(flops, timing.median_s),
        peak_gb=peak_gb(),
        first_loss=round(losses[0], 4),
        last_loss=round(losses[-1], 4),
        losses=[round(loss, 4) for loss in losses],
        steps=len(losses),
        **({} if agree else {"error": f"its losses are not those of {first}"}),
        **found,
    )


def _agreement(section: str, losses: list[float]) -> tuple[bool, str]:
    """Return whether the losses are those of the first contestant that was recorded, and its name."""
    rows = read_rows(RESULTS) if RESULTS.is_file() else []
    first = next((row for row in rows if row["section"] == section and "first_loss" in row), None)
    if first is None:
        return all(map(math.isfinite, losses)), "a finite loss"
    scale, known = abs(first["first_loss"]), first["losses"]
    off = [abs(loss - expected) / scale for loss, expected in zip(losses, known)]
    return off[0] <= FIRST_LOSS and max(off) <= LATER_LOSS, first["name"]


def measure_runs(
    section: str,
    name: str,
    act: Callable[[], object],
    *,
    ok: bool | None = None,
    tokens: int = 0,
    flops: float = 0.0,
    **found: Any,
) -> None:
    """Time an operation and record it.

    Args:
        section, name: the case and the contestant.
        act: what is timed.
        ok: see `record`.
        tokens: tokens of a run; 0 = none are recorded.
        flops: FLOPs of a run; 0 = no TFLOP/s are recorded.
        found: other facts to record.
    """
    release_memory()
    reset_peak()
    timing = time_runs(act, times=pick(12, 2))
    record(
        section,
        name,
        ok,
        ms=timing.ms,
        slowest=f"+{timing.spread:.0%}",
        **({"tokens_s": round(tokens / timing.median_s)} if tokens else {}),
        **(limits(flops, timing.median_s) if flops else {}),
        peak_gb=peak_gb(),
        **found,
    )
