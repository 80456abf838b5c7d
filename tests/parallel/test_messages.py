"""Gathers and scatters by messages: every rank's part arrives where it belongs, also while several are under way."""

import pytest
import torch

from megatron_ds.parallel.collectives import begin_all_gather_dim0, begin_reduce_scatter_dim0
from megatron_ds.parallel.grid import Grid, Layout
from tests.ranks import run_grid

S, H = 12, 5


def _both_at_once(grid: Grid, dtype: torch.dtype) -> None:
    t, rank = grid.tensor.size, grid.tensor.rank
    partial_sums = [torch.randn(H, S, generator=torch.Generator().manual_seed(one)).to(dtype) for one in range(t)]
    whole = partial_sums[0].t()  # not contiguous
    pending = [
        begin_all_gather_dim0(whole[rank * S // t : (rank + 1) * S // t], grid.tensor),
        begin_reduce_scatter_dim0(partial_sums[rank].t(), grid.tensor),
        begin_all_gather_dim0(-whole[rank * S // t : (rank + 1) * S // t], grid.tensor),
    ]
    for _, work in reversed(pending):
        assert work is not None
        work.wait()
    gathered, scattered, negative = (tensor for tensor, _ in pending)
    assert torch.equal(gathered, whole) and torch.equal(negative, -whole)
    expected = sum(partial_sums).t().chunk(t)[rank]
    torch.testing.assert_close(scattered, expected, rtol=0.0 if t == 2 else 1e-6, atol=0.0 if t == 2 else 1e-6)
    assert torch.equal(partial_sums[rank], torch.randn(H, S, generator=torch.Generator().manual_seed(rank)).to(dtype))


@pytest.mark.parametrize("t", [2, 3])
def test_parts_arrive_where_they_belong(t: int) -> None:
    run_grid(_both_at_once, Layout(tensor=t), torch.float64 if t == 3 else torch.bfloat16)
