"""Copies of weights and optimizer state: which ranks hold them, and that one changed bit is found on its rank."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.engine import ReplicaChecksums, replica_checksums
from megatron_ds.engine.replica_checksums import Checksums, Difference, differences
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.grid import Grid
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import run_alone, run_grid

RECIPE = Recipe(steps=2)
BF16 = replace(RECIPE, precision="bf16")

TIED = "embedding.weight"
NORM, MATRIX, KEYS = "blocks.0.attention_norm.weight", "blocks.1.mlp.down.weight", "blocks.0.attention.qkv.kv_weight"


def test_each_changed_bit_and_each_exchange_changes_a_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_checksums, "_PIECE", 1000)

    def inside() -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool):
            x = (torch.arange(3_001) % 2).to(dtype)  # several pieces
            sums = Checksums()
            (before,) = sums.on_host([x])
            bits = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
            for place in (0, 1000, 3_000):
                bits[place] ^= 1
                assert sums.on_host([x]) != [before], (dtype, place)
                bits[place] ^= 1
            assert sums.on_host([x, x[:5], x[:0]])[0] == before
            x[:2] = x[:2].flip(0)
            assert sums.on_host([x]) != [before], "the same elements in another order"

    run_alone(inside)


def test_a_majority_names_the_ranks_that_differ_from_it() -> None:
    found = differences([{"a": 1, "b": 5}, {"a": 1, "b": 5}, {"a": 2}, {"a": 1, "b": 6}])
    assert found == [("a", {1: [0, 1, 3], 2: [2]}), ("b", {5: [0, 1], 6: [3]})]
    assert Difference(*found[0]).suspects == (2,) and Difference(*found[0]).majority == (0, 1, 3)
    tie = Difference("c", {1: [0, 3], 2: [1, 2]})
    assert tie.suspects == (0, 1, 2, 3) and tie.majority == ()


@contextmanager
def _flipped(tensor: Tensor) -> Iterator[None]:
    """Change the lowest bit of the first element within the block."""
    bits = tensor.detach().view(-1)[:1].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits ^= 1
    yield
    bits ^= 1


def _search(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> dict[str, tuple[list[int], Any]]:
    """Return for copies of the last rank: the ranks that hold them, and what is found when it flips a bit of them."""
    engine, _ = engine_on(grid, directory, place, recipe)
    for step in range(recipe.steps):
        engine.train_step(micro_batches(grid, place, recipe, step), recipe.lr)
    checksums = ReplicaChecksums(engine, with_tensor_ranks=True)
    assert checksums.differing() == []
    tensors = {one.name: one.tensor for one in checksums.copies()}
    everyone = gather_objects([(one.holders, one.name) for one in checksums.copies()])
    last, seen = len(everyone) - 1, {}
    for holders, name in everyone[last]:
        if name.startswith((NORM, MATRIX, KEYS, TIED)):
            with _flipped(tensors[name]) if grid.rank == last else nullcontext():
                found = [(one.name, one.suspects) for one in checksums.differing()]
            seen[name] = [rank for rank, theirs in enumerate(everyone) if (holders, name) in theirs], found
    assert checksums.differing() == []
    return seen


ALL = [0, 1, 2, 3]
# of the last of four ranks: the ranks that hold what it holds of the weights of a norm, a matrix, and keys and values,
# and of what the optimizer keeps of them; None = it holds no part of that
PLACES: dict[str, tuple[str, Place, Recipe, tuple[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "ZeRO-0": ("llama", Place(2, 1, 2, 0), RECIPE, (ALL, [1, 3], [1, 3]), (ALL, [1, 3], [1, 3])),
    "ZeRO-1 in bf16": ("llama", Place(2, 1, 2, 1), BF16, (ALL, [1, 3], [1, 3]), (None, None, None)),
    "ZeRO-3": ("llama", Place(2, 1, 2, 3), RECIPE, ([2, 3], [3], [3]), ([2, 3], [3], [3])),
}
MORE: dict[str, tuple[str, Place, Recipe, tuple[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "shared keys": ("mistral-no-window-tied", Place(4, 1, 1, 1), RECIPE, (ALL, [3], [2, 3]), (ALL, [3], [2, 3])),
    "stages": ("mistral-no-window-tied", Place(1, 2, 2, 1), BF16, (None, None, None), (None, None, None)),
    "sequence": ("llama", Place(2, 1, 2, 2, sp=True), RECIPE, (ALL, [1, 3], [1, 3]), (None, None, None)),
}


@pytest.mark.parametrize("case", [*PLACES, *(pytest.param(name, marks=pytest.mark.sweep) for name in MORE)])
def test_a_flipped_bit_is_found_where_other_ranks_hold_the_same(case: str, references: Any) -> None:
    model, place, recipe, weights, moments = (PLACES | MORE)[case]
    directory, _ = references(model, RECIPE)
    seen, *others = run_grid(_search, place.layout, directory, place, recipe)
    for own in others:
        assert own == seen, "all ranks see the same"
    for name, (held, found) in seen.items():
        suspects = (3,) if len(held) > 2 else tuple(held)
        if "optimizer's steps" not in name:  # one tensor counts for all parameters in a vector
            assert found == ([(name, suspects)] if len(held) > 1 else []), name
        elif len(held) > 1:
            assert (name, suspects) in found, name
    for kind, expected in (("weights", weights), ("exp_avg_sq", moments)):
        assert [seen.get(f"{name} ({kind})", [None])[0] for name in (NORM, MATRIX, KEYS)] == list(expected), kind
    if case == "stages":
        assert seen[f"{TIED} (weights)"][0] == ALL, "both stages hold it"


def _experts(grid: Grid, directory: Path, place: Place) -> dict[str, list[int]]:
    engine, _ = engine_on(grid, directory, place, RECIPE)
    engine.train_step(micro_batches(grid, place, RECIPE, 0), RECIPE.lr)
    checksums = ReplicaChecksums(engine, with_tensor_ranks=False)
    assert checksums.differing() == []
    everyone = gather_objects([(one.holders, one.name) for one in checksums.copies() if "(weights)" in one.name])
    return {own[1]: [rank for rank, theirs in enumerate(everyone) if own in theirs] for own in everyone[grid.rank]}


def test_experts_have_replicas_of_their_own(references: Any) -> None:
    """Four data ranks, each two of which divide the experts."""
    directory, _ = references("mixtral-four-experts", RECIPE)
    place = Place(1, 1, 4, 1, expert=2)
    *_, last = run_grid(_experts, place.layout, directory, place)
    of_experts = {name: held for name, held in last.items() if ".experts." in name}
    assert of_experts and all(held == [1, 3] for held in of_experts.values()), of_experts
    assert all(held == ALL for name, held in last.items() if name not in of_experts)


def test_tensor_ranks_are_not_compared_where_the_same_operations_may_round_differently(references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    place = Place(2, 1, 2, 0)

    def norm_holders(grid: Grid) -> list[str]:
        engine, _ = engine_on(grid, directory, place, RECIPE)
        checksums = ReplicaChecksums(engine, with_tensor_ranks=False)
        return gather_objects(next(one.holders for one in checksums.copies() if one.name.startswith(NORM)))

    first, *_ = run_grid(norm_holders, place.layout)
    assert first[0] == first[2] != first[1] == first[3]
