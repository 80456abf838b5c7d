"""Sums through the memory of a machine train what sums over TCP do: five steps against transformers."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.engine.shared_memory import _Sum
from megatron_ds.parallel.grid import Grid
from tests.parallel.wire_bytes import counting
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_on, train_ours
from tests.ranks import run_grid

PLACES = [
    ("llama", Place(2, 1, 1, 0, shared=True)),
    pytest.param("qwen2-2kv", Place(4, 1, 1, 1, recompute="full", shared=True), marks=pytest.mark.sweep),  # spins
    pytest.param("qwen3", Place(2, 1, 1, 1, compiled=True, shared=True), marks=pytest.mark.sweep),
    ("bert-pretraining", Place(2, 1, 1, 2, recompute="selective", shared=True)),
    ("t5-gated", Place(2, 1, 1, 3, shared=True)),
]


@pytest.mark.parametrize(("case", "place"), PLACES, ids=str)
def test_sums_through_memory(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, Recipe())
    errors = relative_errors(train_ours(directory, place, Recipe()), reference)
    assert within_fp32(errors), errors


def _counted(grid: Grid, directory: Path, place: Place) -> float:
    with counting() as wire:
        train_on(grid, directory, place, Recipe())
    return float(wire.bytes["all_reduce"])


def test_what_it_takes_off_the_wire(references: Any) -> None:
    """Only maxima, statistics of the run and DeepSpeed's own are left."""
    directory, _ = references("llama", Recipe())
    sent = [run_grid(_counted, Place(2).layout, directory, Place(2, shared=shared))[0] for shared in (False, True)]
    assert 0 < sent[1] < 0.1 * sent[0], sent


def _forgetful(grid: Grid, directory: Path, place: Place) -> dict[str, Any]:
    _Sum.__call__ = lambda self, x: True  # type: ignore[method-assign]
    return train_on(grid, directory, place, Recipe())


def test_sums_that_do_not_happen_are_noticed(references: Any) -> None:
    directory, reference = references("llama", Recipe())
    place = PLACES[0][1]
    errors = relative_errors(run_grid(_forgetful, place.layout, directory, place)[0], reference)
    assert not within_fp32(errors), errors
