"""Learned positions end with their table; only the padding for context ranks may reach beyond it."""

from typing import Any

import pytest
import torch

from megatron_ds.errors import DataError
from megatron_ds.layers.embedding import LearnedPositions, PositionTable
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.tensor import TensorParallel
from tests.ranks import run_alone

FOUR = Axis(size=4, rank=3, ranks=(0, 1, 2, 3))
ALONE, SEQUENCE = TensorParallel(), TensorParallel(FOUR, sequence=True)
CONTEXT = TensorParallel(context=ContextParallel(FOUR, ulysses=FOUR))


def _add(tp: TensorParallel, max_positions: int, length: int) -> Any:
    layer = LearnedPositions(PositionTable(max_positions), 2, tp, std=1.0)
    layer.weight.data = torch.arange(2.0 * max_positions).view(-1, 2)
    try:
        return layer(torch.zeros(length // tp.num_parts, 1, 2)).detach()
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(("tp", "length"), [(ALONE, 7), (SEQUENCE, 8), (SEQUENCE, 12), (CONTEXT, 12)])
def test_a_sequence_beyond_the_table_is_refused(tp: TensorParallel, length: int) -> None:
    assert run_alone(_add, tp, 6, length) == (
        f"a sequence has {length} positions, and the model's table has 6; try shorter sequences"
    )


def test_padding_of_context_ranks_has_the_last_position() -> None:
    assert run_alone(_add, CONTEXT, 7, 8).squeeze(1).tolist() == [[12.0, 13.0], [12.0, 13.0]]
