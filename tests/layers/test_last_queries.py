"""Attention over context ranks asks kernels for the last queries of fetched keys, and gets what whole rows give."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.kernels import REFERENCE, AttentionCall
from megatron_ds.layers.kernels.by_call import Entry, KernelsByCall
from megatron_ds.layers.kernels.reference import is_plain_of_last_queries, reference_attention
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.tensor import TensorParallel
from tests.parity.cases import CONFIGS
from tests.ranks import run_ranks

LENGTH, BATCH = 24, 2


def _attention(case: str, grid: Grid, calls: list[tuple[int, int, int | None]]) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        calls.append((len(q), len(k), call.window))
        return reference_attention(q, k, v, call).to(q.dtype)

    kernels = KernelsByCall([Entry("formula", is_plain_of_last_queries, lambda *arguments: attend)])
    context = ContextParallel(grid.context, grid.ulysses, grid.ring, "gather", zigzag=True)
    shape = read_model(CONFIGS[case]).core.attention(0)
    layer = Attention(
        shape, TensorParallel(context=context), None, Recompute(), None, replace(REFERENCE, attention=kernels)
    )
    for name, parameter in layer.named_parameters():
        parameter.data = initial_shard(name, spec_of(parameter), 1, grid.model_axes).to(torch.bfloat16)
    return layer


def _run(info: RankInfo, case: str, context: int) -> dict[str, Any]:
    grid, calls = create_grid(Layout(context=context), info.rank, ulysses=1), list[tuple[int, int, int | None]]()
    layer = _attention(case, grid, calls)
    x = torch.randn(LENGTH, BATCH, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    own = layer.context.positions(LENGTH, x.device)
    mine = x[own].requires_grad_()
    y = layer(mine)
    y.backward(torch.ones_like(y))
    assert mine.grad is not None
    return {"own": torch.arange(LENGTH)[own], "y": y, "grad": mine.grad, "calls": calls}


@pytest.mark.parametrize(("case", "keys"), [("llama", [(6, 6), (6, 24)]), ("mistral", [(6, 6), (6, 12)])])
def test_kernels_compute_the_last_queries(case: str, keys: list[tuple[int, int]]) -> None:
    """Rank 0 has the first and the last quarter; with a window of 7 the last one fetches the quarter before it."""
    window = CONFIGS[case].get("sliding_window")
    (whole,), parts = run_ranks(_run, 1, case, 1), run_ranks(_run, 2, case, 2)
    assert parts[0]["calls"] == [(*one, window) for one in keys]
    for part in parts:
        for name in ("y", "grad"):
            torch.testing.assert_close(part[name], whole[name][part["own"]], rtol=2e-2, atol=2e-2)
