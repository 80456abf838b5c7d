"""Vectors of texts and their gradients against the formula in plain torch: rows of other lengths, padding on either
side, on one process and under sequence parallelism."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from megatron_ds.models.hidden_output import PICKS, PoolingConfig, text_vectors
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.ranks import run_alone, run_grid

S, B, H = 8, 4, 3
SEEN = [range(8), range(5), range(3, 8), range(2, 6)]  # positions of the tokens of each row
MASK = torch.tensor([[position in row for position in range(S)] for row in SEEN])
HIDDEN = torch.randn(S, B, H, generator=torch.Generator().manual_seed(0))
ALONG = torch.arange(1.0, B * H + 1).view(B, H)
CASES = [(MASK, SEEN), (MASK.long(), SEEN), (None, [range(S)] * B)]
Found = list[dict[str, tuple[Tensor, Tensor]]]


def formula() -> Found:
    """Of each case and pick the vectors, and the gradient of their inner product with `ALONG`."""
    return [{pick: _written_out(pick, rows) for pick in PICKS} for _, rows in CASES]


def _written_out(pick: str, rows: list[range]) -> tuple[Tensor, Tensor]:
    hidden = HIDDEN.clone().requires_grad_()
    picked = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.sum(0) / len(x)}[pick]
    vectors = torch.stack([picked(hidden[row.start : row.stop, index]) for index, row in enumerate(rows)])
    vectors = vectors / (vectors**2).sum(1, keepdim=True) ** 0.5
    (vectors * ALONG).sum().backward()
    assert hidden.grad is not None
    return vectors.detach(), hidden.grad


def ours(grid: Grid) -> Found:
    tp = parallel_of(grid)
    return [{pick: _computed(pick, mask, tp) for pick in PICKS} for mask, _ in CASES]


def parallel_of(grid: Grid) -> TensorParallel:
    context = ContextParallel(grid.context, grid.ulysses, grid.ring, zigzag=grid.ring.size > 1)
    return TensorParallel(grid.tensor, sequence=True, context=context)


def held(grid: Grid) -> list[int]:
    """The positions of a rank, in its order."""
    return torch.arange(S)[parallel_of(grid).positions(S, torch.device("cpu"))].tolist()


def _computed(pick: str, mask: Tensor | None, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    hidden = HIDDEN[tp.positions(S, HIDDEN.device)].clone().requires_grad_()
    vectors = text_vectors(hidden, mask, PoolingConfig(pick=pick, normalize=True), tp)
    ((vectors * ALONG).sum() * (tp.context.axis.rank == 0)).backward()  # losses of texts are one context rank's
    assert hidden.grad is not None
    return vectors.detach(), hidden.grad


@pytest.mark.parametrize(
    ("layout", "ulysses"),
    [
        (Layout(), None),
        (Layout(tensor=2), None),
        (Layout(context=2), None),
        (Layout(context=2), 1),
        (Layout(context=2, tensor=2), 1),
    ],
    ids=str,
)
def test_vectors_and_their_gradients(layout: Layout, ulysses: int | None) -> None:
    ranks: list[Found] = run_grid(ours, layout, ulysses=ulysses)
    at = torch.tensor(list(chain(*run_grid(held, layout, ulysses=ulysses))))
    for case, expected in enumerate(run_alone(formula)):
        for pick, (vectors, gradient) in expected.items():
            torch.testing.assert_close(torch.cat([rank[case][pick][1] for rank in ranks]), gradient[at])
            for rank in ranks:
                torch.testing.assert_close(rank[case][pick][0], vectors)


def test_a_vector_without_normalisation_keeps_its_length() -> None:
    found = text_vectors(HIDDEN, MASK, PoolingConfig(pick="last"), TensorParallel())
    assert torch.equal(found, torch.stack([HIDDEN[row.stop - 1, index] for index, row in enumerate(SEEN)]))
