"""Mixtures of experts: their grouped products, the losses of a small one, and its experts divided among ranks.

`python -m bench.gpu.right.experts [NAME ...]` runs all of `PARTS`, or some of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.record import DEVICE, guarded, pick, record, torch_device, wait_for_turn
from bench.gpu.right import layouts
from bench.gpu.right.matrix import BOUNDS
from bench.gpu.right.reference import STEPS, reference_losses
from bench.gpu.right.small_runs import Setting, largest_difference, train
from megatron_ds.layers.moe.grouped import Groups, grouped_linear
from megatron_ds.layers.products import keep_gradient_sum
from megatron_ds.parallel.launch import run_local

LOSS_BOUNDS = {**BOUNDS, "fp32": 1e-4}
"""A router on another device may choose another expert where two are nearly equal, which changes a loss a little."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COUNTS = {
    "uneven": (37, 0, 1, 90, 128, 7, 0, 25),
    "one group": (0, 0, 0, 511, 0, 0, 0, 0),
    "no row": (0,) * 8,
    "even": (64,) * 8,
}
IN, OUT_FEATURES = pick(2048, 32), pick(768, 48)

SETTINGS = {
    "fp32 zero0": Setting("fp32", 0, experts=True),
    "fp32 zero3": Setting("fp32", 3, experts=True),
    "bf16 zero1": Setting("bf16", 1, experts=True),
    "bf16 zero1 recompute full": Setting("bf16", 1, engine={"recompute": "full"}, experts=True),
    "bf16 zero2": Setting("bf16", 2, experts=True),
    "bf16 zero3": Setting("bf16", 3, experts=True),
    "fp16 zero1": Setting("fp16", 1, experts=True),
}
TENSOR = {"parallel": {"tensor": 2, "sequence": True}}
LAYOUTS = {
    "over tensor": Setting(engine=TENSOR, ranks=2, experts=True),
    "over tensor, bf16": Setting("bf16", engine=TENSOR, ranks=2, experts=True),
    "over data, zero1": Setting(zero=1, engine={"parallel": {"expert": 2}}, ranks=2, experts=True),
    "over data, bf16 zero2": Setting("bf16", 2, engine={"parallel": {"expert": 2}}, ranks=2, experts=True),
    "over data, zero3": Setting(zero=3, engine={"parallel": {"expert": 2}}, ranks=2, experts=True),
    "over tensor and data": Setting(engine={"parallel": {**TENSOR["parallel"], "expert": 4}}, ranks=4, experts=True),
}


# ---- products --------------------------------------------------------------------------------------------------------


def products() -> None:
    """Compare outputs and gradients in every precision with a loop in fp32 on the CPU, in a process of their own."""
    run_local(lambda info: _compare_products(), 1, timeout_s=60.0)


def _compare_products() -> None:
    for precision, dtype in DTYPES.items():
        for summed in (False, True):
            title = f"products, {precision}{', gradients summed in fp32' * summed}"
            guarded("experts", title, partial(_products, title, dtype, BOUNDS[precision], summed))


def _products(title: str, dtype: torch.dtype, bound: float, summed: bool) -> None:
    errors = {name: _largest_error(counts, dtype, summed) for name, counts in COUNTS.items()}
    record("experts", title, all(error <= bound for error in errors.values()), bound=bound, **errors)


def _largest_error(counts: tuple[int, ...], dtype: torch.dtype, summed: bool) -> float:
    """Return the largest difference of a product or gradient, relative to its largest value, by both ways."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, bias = (
        drawn(sum(counts), IN),
        drawn(len(counts), 2, OUT_FEATURES, IN),
        drawn(len(counts), 2, OUT_FEATURES),
    )
    gradient = drawn(sum(counts), 2 * OUT_FEATURES)
    found = _both_ways(_grouped, [x, weight, bias], gradient, counts, torch_device(), summed)
    expected = _both_ways(
        _loop, [x.float(), weight.float(), bias.float()], gradient.float(), counts, torch.device("cpu")
    )
    largest = 0.0
    for one, other in zip(found, expected):
        if other.numel():
            scale = max(float(other.abs().max()), 1e-30)
            error = float((one.float().cpu() - other).abs().max()) / scale
            largest = max(largest, error if math.isfinite(error) else math.inf)
    return float(f"{largest:.1e}")


def _both_ways(
    compute: Callable[..., Tensor],
    given: list[Tensor],
    gradient: Tensor,
    counts: tuple[int, ...],
    device: torch.device,
    summed: bool = False,
) -> list[Tensor]:
    """Return the result, then the gradients of rows, weights and biases, on a device."""
    x, weight, bias = (one.detach().to(device).requires_grad_() for one in given)
    total = torch.zeros_like(weight, dtype=torch.float32)
    if summed:
        keep_gradient_sum(weight, total)
    y = compute(x, counts, weight, bias)
    y.backward(gradient.to(device))
    assert x.grad is not None and bias.grad is not None
    if summed:
        assert weight.grad is None
        return [y.detach(), x.grad, total, bias.grad]
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad, bias.grad]


def _grouped(x: Tensor, counts: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
    return grouped_linear(x, Groups(torch.tensor(counts, device=x.device)), weight, bias)


def _loop(x: Tensor, counts: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
    parts = zip(x.split(counts), weight.flatten(1, 2), bias.flatten(1))
    return torch.cat([F.linear(*part) for part in parts])


# ---- runs ------------------------------------------------------------------------------------------------------------


def losses() -> None:
    """Train with each setting, and compare the losses with those in fp32 on the CPU."""
    for name, setting in SETTINGS.items():
        guarded("experts", name, partial(_losses, name, setting))


def _losses(name: str, setting: Setting) -> None:
    if setting.precision == "fp16" and DEVICE == "cpu":
        record("experts", name, None, skipped="DeepSpeed has no fp16 on CPUs")
        return
    steps, bound = min(10, STEPS), LOSS_BOUNDS[setting.precision]
    outcome = train(setting, steps)
    off = largest_difference(outcome.losses, list(reference_losses("experts", steps)))
    right = off < bound and all(map(math.isfinite, outcome.norms)) and outcome.applied == steps
    record("experts", name, right, difference=float(f"{off:.1e}"), bound=bound, ms=outcome.ms, peak_gb=outcome.peak_gb)


def ranks() -> None:
    """Divide the experts among ranks that share the device, and compare with one rank."""
    alone = train(Setting(experts=True), layouts.STEPS)
    for name, setting in LAYOUTS.items():
        guarded("experts", name, partial(layouts.compare, f"experts {name}", setting, alone))


PARTS: dict[str, Callable[[], None]] = {"products": products, "losses": losses, "ranks": ranks}


if __name__ == "__main__":
    wait_for_turn()
    for part in sys.argv[1:] or PARTS:
        guarded("experts", part, PARTS[part])
