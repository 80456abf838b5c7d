"""Layers with experts, forward and backward, ours and transformers', and the products of their experts alone.

The products of 128 groups of rows are held against one dense product of the same FLOPs, their ceiling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.fast.blocks import Run, build_ours, compete, run_of_ours, run_of_theirs
from bench.gpu.fast.measure import measure_runs
from bench.gpu.fast.models import EXPERTS
from bench.gpu.fast.targets import (
    DENSE,
    EXPERT_BLOCKS,
    EXPERTS_DOWN,
    EXPERTS_UP,
    GROUPED,
    OURS,
    THEIRS_GROUPED,
)
from bench.gpu.record import guarded, torch_device, wait_for_turn
from megatron_ds.engine import preload
from megatron_ds.hf.config import read_model
from megatron_ds.layers.moe.grouped import Groups, grouped_linear

SAME_CHOICE = 8e-2
"""Relative L2 difference of outputs and gradients in bf16: routers that round differently choose other experts where
two are nearly equal. Seen on a CPU at narrower shapes: 2e-2."""


def layers() -> None:
    """Measure transformers' layers with its grouped product, then ours."""
    model = read_model(EXPERTS.model)
    contestants: dict[str, Callable[[], Run]] = {
        THEIRS_GROUPED: lambda: run_of_theirs(EXPERTS, experts="grouped_mm"),
        OURS: lambda: run_of_ours(build_ours(model), EXPERTS),
    }
    compete(EXPERT_BLOCKS, EXPERTS, contestants, SAME_CHOICE)


def products() -> None:
    """Measure the products of one layer's experts, of tokens that choose at random."""
    hidden, ffn = EXPERTS.model["hidden_size"], EXPERTS.model["moe_intermediate_size"]
    for section, outputs, inputs in ((EXPERTS_UP, 2 * ffn, hidden), (EXPERTS_DOWN, hidden, ffn)):
        guarded(section, GROUPED, lambda: _products(section, outputs, inputs))  # noqa: B023


def _products(section: str, outputs: int, inputs: int) -> None:
    device, num_experts, top_k = torch_device(), EXPERTS.model["num_experts"], EXPERTS.model["num_experts_per_tok"]
    chosen = torch.rand(EXPERTS.tokens, num_experts, device=device).topk(top_k).indices
    groups, num_rows = Groups(chosen.flatten().bincount(minlength=num_experts)), chosen.numel()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, gradient, weights = drawn(num_rows, inputs), drawn(num_rows, outputs), drawn(num_experts, outputs, inputs)
    x.requires_grad_()
    weights.requires_grad_()

    def grouped() -> None:
        torch.autograd.grad(grouped_linear(x, groups, weights), (x, weights), gradient)

    @torch.no_grad()
    def dense() -> None:
        x @ weights[0].t()
        gradient @ weights[0]
        gradient.t() @ x

    flops = 6.0 * num_rows * outputs * inputs
    for name, run in ((DENSE, dense), (GROUPED, grouped)):
        measure_runs(section, name, run, flops=flops, rows=num_rows)


if __name__ == "__main__":
    preload()
    wait_for_turn()
    products()
    layers()
