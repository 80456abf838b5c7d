"""DeepSpeed's gathers and scatters on CPU are messages, in the memory that DeepSpeed hands over."""

from collections.abc import Callable

import pytest
import torch

from megatron_ds.parallel.grid import Grid, Layout
from tests.parallel.wire_bytes import counting
from tests.ranks import run_grid

SIZE = 5


def _as_zero_3_calls_them(grid: Grid) -> None:
    """ZeRO-3 hands over a rank's part of the result as the input of a gather, and the reverse for a scatter."""
    from deepspeed import comm

    size, rank = grid.world.size, grid.world.rank
    whole = torch.arange(float(size * SIZE))
    flat = torch.full_like(whole, torch.nan)
    part = flat.chunk(size)[rank].copy_(whole.chunk(size)[rank])
    summands = whole * (rank + 1)
    with counting() as wire:
        work = comm.allgather_fn(flat, part, group=grid.world.group, async_op=True)
        comm.reduce_scatter_fn(torch.empty(SIZE), summands, group=None)
        comm.reduce_scatter_fn(summands.chunk(size)[rank], summands, group=grid.world.group)
        work.wait()
    assert torch.equal(flat, whole)
    assert torch.equal(summands.chunk(size)[rank], whole.chunk(size)[rank] * sum(range(1, size + 1)))
    assert wire.bytes == {"send": 3 * (size - 1) * part.nbytes}, "nothing passes through gloo's collectives"


def _alone(grid: Grid) -> None:
    """The data ranks of a pure tensor layout."""
    from deepspeed import comm
    from torch import distributed as dist

    groups = [dist.new_group([rank]) for rank in range(grid.world.size)]
    whole, out, flat = torch.arange(float(SIZE)), torch.zeros(SIZE), torch.zeros(SIZE)
    comm.reduce_scatter_fn(out, whole, group=groups[grid.rank])
    comm.allgather_fn(flat, whole, group=groups[grid.rank], async_op=True).wait()
    assert torch.equal(out, whole) and torch.equal(flat, whole)


@pytest.mark.parametrize("body", [_as_zero_3_calls_them, _alone])
def test_deepspeed_gathers_and_scatters_by_messages(body: Callable[[Grid], None]) -> None:
    run_grid(body, Layout(data=3))
