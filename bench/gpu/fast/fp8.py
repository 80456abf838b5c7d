"""Matrix products in fp8 on an 8 B model's layer shapes, with the cost of casting, against bf16.

It decides whether training in fp8 would pay: the three products of each projection (forward, input gradient, weight
gradient) in bf16, and in fp8 (e4m3) by `torch._scaled_mm` with one scale for each tensor, or one for each row. Weights,
activations and gradients are cast in every step, as weights change in every step. A cast finds the largest magnitude,
scales, rounds, and writes the layout that the product needs; torch.compile makes one or two kernels of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.fast.measure import recorded
from bench.gpu.fast.models import BLOCKS
from bench.gpu.fast.products import layer_shapes
from bench.gpu.fast.targets import COMPILED, LLAMA_BLOCKS, OURS
from bench.gpu.judgement import Figure
from bench.gpu.record import DEVICE, guarded, pick, record, release_memory, time_runs, torch_device, wait_for_turn

TITLE = "fp8, the projections of an 8 B Llama's layer, forward and backward"
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TINIEST = 1e-12  # of a scale's largest magnitude: rows of zeros stay zeros

CPU_HAS_ROWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

Scaled = tuple[Tensor, Tensor]
"""fp8 values (rows, inner), contiguous, and fp32 scales: () or (rows, 1)."""


def cast_tensor(x: Tensor) -> Scaled:
    """Cast to fp8 with one scale."""
    scale = x.abs().amax().float().clamp(min=TINIEST) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def cast_rows(x: Tensor) -> Scaled:
    """Cast to fp8 with a scale for each row."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=TINIEST) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def both_layouts_tensor(x: Tensor) -> tuple[Scaled, Scaled]:
    """Cast a matrix and its transpose with one scale."""
    values, scale = cast_tensor(x)
    return (values, scale), (values.t().contiguous(), scale)


def both_layouts_rows(x: Tensor) -> tuple[Scaled, Scaled]:
    """Cast a matrix with a scale for each row, and its transpose likewise."""
    (values, scale), (turned, turned_scale) = cast_rows(x), cast_rows(x.t())
    return (values, scale), (turned.contiguous(), turned_scale)


def scaled_product(left: Scaled, right: Scaled, *, fast: bool) -> Tensor:
    """Return left @ right^T in bf16: (rows, inner) and (columns, inner) -> (rows, columns).

    Args:
        left, right: the matrices.
        fast: sum in the tensor cores' own precision, as is usual in the forward pass.
    """
    (a, a_scale), (b, b_scale) = left, right
    turned = b_scale.t() if b_scale.dim() else b_scale
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=turned, out_dtype=torch.bfloat16, use_fast_accum=fast)


@dataclass(frozen=True)
class Projection:
    """One projection: input (tokens, inner), weight (wide, inner), gradient of the output (tokens, wide), in bf16."""

    x: Tensor
    weight: Tensor
    gradient: Tensor

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, input gradient and weight gradient in the dtype of the matrices."""
        return self.x @ self.weight.t(), self.gradient @ self.weight, self.gradient.t() @ self.x

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.gradient


Both = Sequence[tuple[Scaled, Scaled]]
"""Input, weight and gradient: each as it is, and transposed."""


def products_fp8(cast: Both) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, input gradient and weight gradient from the cast matrices."""
    (x, x_turned), (weight, weight_turned), (gradient, gradient_turned) = cast
    return (
        scaled_product(x, weight, fast=True),
        scaled_product(gradient, weight_turned, fast=False),
        scaled_product(gradient_turned, x_turned, fast=False),
    )


RECIPES: dict[str, Callable[[Tensor], tuple[Scaled, Scaled]]] = {
    "one scale a tensor": both_layouts_tensor,
    "one scale a row": both_layouts_rows,
}


def projection(tokens: int, wide: int, inner: int) -> Projection:
    """Draw a projection with the magnitudes of a layer."""
    device = torch_device()

    def drawn(rows: int, columns: int, std: float) -> Tensor:
        return (torch.randn(rows, columns, device=device) * std).bfloat16()

    return Projection(drawn(tokens, inner, 1.0), drawn(wide, inner, 0.02), drawn(tokens, wide, 1e-3))


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error."""
    return float((found.float() - expected).norm() / expected.norm())


def measure(recipe: str, cast: Callable[[Tensor], tuple[Scaled, Scaled]]) -> None:
    """Record each projection, then the sum over the layer."""
    sums = dict.fromkeys(("bf16_ms", "fp8_products_ms", "casts_ms"), 0.0)
    # compiled once for all shapes
    compiled: Any = torch.compile(cast, dynamic=True) if DEVICE == "cuda" else cast
    for name, (wide, inner) in layer_shapes(BLOCKS).items():
        one = projection(BLOCKS.tokens, wide, inner)
        both = [compiled(matrix) for matrix in one.matrices]
        full = Projection(*(matrix.float() for matrix in one.matrices)).products()
        errors = [error(found, expected) for found, expected in zip(products_fp8(both), full)]
        rounding = [error(found, expected) for found, expected in zip(one.products(), full)]
        del full
        figures = {
            "bf16_ms": milliseconds(one.products),
            "fp8_products_ms": milliseconds(lambda: products_fp8(both)),  # noqa: B023
            "casts_ms": milliseconds(lambda: [compiled(matrix) for matrix in one.matrices]),  # noqa: B023
        }
        sums = {key: sums[key] + figures[key] for key in sums}
        errors_of = dict(zip(("error_output", "error_input_gradient", "error_weight_gradient"), map(_short, errors)))
        record(TITLE, f"{recipe}: {name}", None, **summed(figures), **errors_of, error_bf16=_short(max(rounding)))
        release_memory()
    record(TITLE, f"{recipe}: one layer", None, **summed(sums), **_gain_of_layer(sums))


def milliseconds(act: Callable[[], object]) -> float:
    """Return the median time of an operation, in ms."""
    return time_runs(act, times=pick(20, 2), budget_s=0.3).median_s * 1e3


def summed(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures with the time of fp8 with its casts, and bf16's time relative to it."""
    fp8_ms = figures["fp8_products_ms"] + figures["casts_ms"]
    rounded = {key: round(value, 3) for key, value in figures.items()}
    return {**rounded, "fp8_ms": round(fp8_ms, 3), "gain": round(figures["bf16_ms"] / fp8_ms, 3)}


def _gain_of_layer(sums: dict[str, float]) -> dict[str, float]:
    """Return the speed of a whole layer in fp8 relative to bf16, if the layer was measured."""
    layers_ms = [ms for name in (OURS, COMPILED) if (ms := recorded(Figure(LLAMA_BLOCKS, name, "ms")))]
    if not layers_ms:
        return {}
    layer_ms = min(layers_ms) / BLOCKS.model["num_hidden_layers"]
    saved_ms = sums["bf16_ms"] - sums["fp8_products_ms"] - sums["casts_ms"]
    return {"gain_of_layer": round(layer_ms / (layer_ms - saved_ms), 3)}


def _short(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    wait_for_turn()
    for recipe, cast in RECIPES.items():
        if DEVICE == "cpu" and cast is both_layouts_rows and not CPU_HAS_ROWS:
            continue
        guarded(TITLE, recipe, lambda recipe=recipe, cast=cast: measure(recipe, cast))  # type: ignore[misc]
