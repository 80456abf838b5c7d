"""Tokens reach the experts that are chosen for them, in a fixed order, and their results come back to them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.moe.dispatch import Dispatch, count_per_expert, inverse_of
from megatron_ds.parallel.collectives import gather_rows, rows_of, split_rows
from megatron_ds.parallel.grid import Axis, Grid, Layout
from tests.ranks import run_grid

E, K, H = 8, 2, 6
TOKENS = {"uneven": (5, 2, 7, 3), "one token": (0, 1, 0, 0), "none": (0, 0, 0, 0), "fewer than experts": (1, 2, 1, 1)}
"""Tokens of each of 4 ranks; 2 ranks have the first two numbers."""
CHOICES = ("random", "first expert", "last rank")


def _choice(kind: str, rank: int, count: int) -> Tensor:
    """k different experts for each token."""
    generator = torch.Generator().manual_seed(rank)
    if kind == "first expert":
        return torch.tensor([0, 1]).repeat(count, 1)
    experts = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(count)]) if count else None
    chosen = experts if experts is not None else torch.empty(0, K, dtype=torch.int64)
    return chosen % 2 + torch.tensor([E - 2, E - 4]) if kind == "last rank" else chosen


def _tokens(rank: int, count: int) -> Tensor:
    """Features are random, but for the first two: the rank and the index of the token."""
    tokens = torch.randn(count, H, generator=torch.Generator().manual_seed(10 + rank))
    tokens[:, 0], tokens[:, 1] = rank, torch.arange(count)
    return tokens


def _weights(rank: int, count: int) -> Tensor:
    return torch.rand(count, K, generator=torch.Generator().manual_seed(20 + rank)) + 0.5


def _factors(experts: Sequence[int]) -> Tensor:
    """What stands for very different experts: each multiplies by a power of 4."""
    return 4.0 ** torch.tensor(experts, dtype=torch.float32)


def _one(axis: Axis, kind: str, count: int) -> dict[str, Tensor]:
    """What a rank's experts get, and what its tokens get back."""
    chosen, local = _choice(kind, axis.rank, count), E // axis.size
    tokens, weights = _tokens(axis.rank, count).requires_grad_(), _weights(axis.rank, count).requires_grad_()
    dispatch = Dispatch(chosen, E, axis)
    rows = dispatch.send(tokens)
    own = torch.arange(axis.rank * local, (axis.rank + 1) * local).repeat_interleave(dispatch.counts)
    found = dispatch.combine(rows * _factors(own.tolist()).unsqueeze(-1), weights)
    found.backward(torch.ones_like(found).cumsum(0))
    assert tokens.grad is not None and weights.grad is not None
    rows = torch.cat([own.unsqueeze(-1), rows], dim=1)
    return {
        "rows": rows,
        "found": found,
        "tokens": tokens.grad,
        "weights": weights.grad,
        "sent": dispatch.chosen_counts,
    }


def _all(grid: Grid) -> dict[tuple[str, str], dict[str, Tensor]]:
    return {
        (kind, name): _one(grid.tensor, kind, counts[grid.tensor.rank])
        for kind in CHOICES
        for name, counts in TOKENS.items()
    }


def _expected(kind: str, rank: int, count: int) -> dict[str, Tensor]:
    """The same by a loop over tokens."""
    chosen = _choice(kind, rank, count)
    tokens, weights = _tokens(rank, count).requires_grad_(), _weights(rank, count).requires_grad_()
    assert len(chosen) == count
    factors = _factors(chosen.flatten().tolist()).view(count, K)
    found = (tokens.unsqueeze(1) * (factors * weights).unsqueeze(-1)).sum(1)
    found.backward(torch.ones_like(found).cumsum(0))
    assert tokens.grad is not None and weights.grad is not None
    return {"found": found.detach(), "tokens": tokens.grad, "weights": weights.grad}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tokens_go_to_their_experts_and_come_back(size: int) -> None:
    ranks = run_grid(_all, Layout(tensor=size))
    for key in ranks[0]:
        kind, name = key
        choices = [_choice(kind, rank, TOKENS[name][rank]) for rank in range(size)]
        arrived = torch.cat([found[key]["rows"] for found in ranks])
        order = [
            (expert, source, token)
            for expert in range(E)
            for source, chosen in enumerate(choices)
            for token in range(len(chosen))
            if expert in chosen[token].tolist()
        ]
        assert [tuple(row) for row in arrived[:, :3].long().tolist()] == order, key
        for rank, found in enumerate(ranks):
            assert found[key]["sent"].tolist() == choices[rank].flatten().bincount(minlength=E).tolist()
            for what, tensor in _expected(kind, rank, TOKENS[name][rank]).items():
                torch.testing.assert_close(found[key][what], tensor, rtol=1e-6, atol=1e-6, msg=f"{key} {rank} {what}")


def _repeated(grid: Grid) -> bool:
    first, second = (_one(grid.tensor, "random", 300) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_again_is_the_same_to_the_bit(size: int) -> None:
    assert all(run_grid(_repeated, Layout(tensor=size)))


def test_a_permuted_batch_gives_the_permuted_output_to_the_bit() -> None:
    chosen, tokens, weights = _choice("random", 0, 50), _tokens(0, 50), _weights(0, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))

    def mixed(chosen: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        dispatch = Dispatch(chosen, E, Axis())
        rows = dispatch.send(tokens)
        experts = torch.arange(E).repeat_interleave(dispatch.counts)
        return dispatch.combine(torch.sin(rows * _factors(experts.tolist()).unsqueeze(-1)), weights)

    found = mixed(chosen[order], tokens[order], weights[order])
    assert torch.equal(found, mixed(chosen, tokens, weights)[order])


def test_counts_and_inverses() -> None:
    assert count_per_expert(torch.tensor([0, 0, 2, 5]), 6).tolist() == [2, 0, 1, 0, 0, 1]
    assert count_per_expert(torch.tensor([0, 3, 6, 6, 6]), 6).tolist() == [1, 0, 0, 1, 0, 0]  # 6 stands for none
    assert count_per_expert(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    order = torch.randperm(20)
    assert torch.equal(order[inverse_of(order)], torch.arange(20))


def _split(grid: Grid) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each count, this rank's rows of some that all have, all of them again, and the gradient of what went in."""
    found = []
    for count in COUNTS:
        x = (torch.arange(count * 2.0).view(count, 2) + 1).requires_grad_()
        own = split_rows(x, grid.tensor)
        whole = gather_rows(own * (grid.tensor.rank + 1), grid.tensor, count)
        whole.backward(torch.ones_like(whole))
        assert x.grad is not None
        found.append((own, whole, x.grad))
    return found


COUNTS = (0, 1, 3, 4, 7)


def test_ranks_divide_any_number_of_rows() -> None:
    for count, ranks in zip(COUNTS, zip(*run_grid(_split, Layout(tensor=4)))):
        x = torch.arange(count * 2.0).view(count, 2) + 1
        factors = torch.cat([torch.full((len(own), 1), rank + 1.0) for rank, (own, _, _) in enumerate(ranks)])
        assert torch.equal(torch.cat([own for own, _, _ in ranks]), x)
        for _, whole, gradient in ranks:
            assert torch.equal(whole, x * factors) and torch.equal(gradient, factors.expand(-1, 2))
        slices = [rows_of(Axis(4, rank, (0, 1, 2, 3)), count) for rank in range(4)]
        assert [len(own) for own, _, _ in ranks] == [len(range(count)[one]) for one in slices]
