"""The speed limit: matrix products on this machine, measured in alternation with the contestants."""

from __future__ import annotations

from bench.contestant import Step
from bench.work import Spec
from megatron_ds.monitor import peak_flops

SHAPE = {"cpu": (2048, 512, 1408), "cuda": (8192, 8192, 8192)}  # the work's own sizes; larger on a GPU
REPEATS = 20


def flops_of_step(device: str) -> float:
    """Return the FLOPs of one step of `products`."""
    rows, inner, columns = SHAPE[device]
    return 2.0 * rows * inner * columns * REPEATS


def products(spec: Spec) -> Step:
    """Compute plain matrix products in the work's precision."""
    import torch

    dtype = torch.bfloat16 if spec.work.dtype == "bf16" else torch.float32
    rows, inner, columns = SHAPE[spec.device]
    a = torch.randn(rows, inner, dtype=dtype, device=spec.device)
    b = torch.randn(columns, inner, dtype=dtype, device=spec.device)
    out = torch.empty(rows, columns, dtype=dtype, device=spec.device)

    def step() -> float:
        for _ in range(REPEATS):
            torch.mm(a, b.t(), out=out)
        return 0.0

    return step


def device_peak(device: str) -> float | None:
    """Return the dense bf16 FLOP/s of the device's data sheet; None if unknown."""
    import torch

    return peak_flops(torch.cuda.get_device_name(), "bf16") if device == "cuda" else None


def device_count(device: str) -> int | None:
    """Return the number of ranks that can have their own device; None if ranks share it."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else None
