"""Sequences divided over context ranks: five steps equal transformers and AdamW in one process, by every method.

Bounds are those of `test_layouts.py`. Rows have labels, padding and documents on both sides of every border.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.layers.tiles import set_queries_of_a_tile
from tests.parity.cases import Recipe
from tests.parity.context_cases import (
    DECODERS,
    EXPERT_PLACES,
    EXPERTS,
    FAMILIES,
    FEW_KEY_HEADS,
    FOUR,
    GATHER_2,
    GATHER_2X2,
    GATHER_4,
    ODD,
    ODD_PACKED,
    PACKED,
    PADDED,
    PLACES,
    RECIPE,
    RING_2,
    RING_2X2,
    RING_4,
    SCALE,
    SEEN,
    TWO,
    ULYSSES_2,
    ULYSSES_4,
    UNUSUAL,
    with_axes,
)
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_ours
from tests.parity.test_layouts import BF16_BOUNDS

Run = tuple[str, Place, Recipe]
MODES = ("none", "selective", "full")

SAMPLE: list[Run] = [
    ("llama", with_axes(ULYSSES_2, 2, 1, 1, 1, True), RECIPE),
    ("llama", with_axes(RING_2, 1, 1, 2, 3), SCALE),
    ("llama", replace(RING_4, recompute="full"), PACKED),
    ("qwen3", with_axes(RING_2, 1, 2, 1, 1), RECIPE),
    ("gemma2-caps", RING_2X2, RECIPE),
    ("gemma2-caps", GATHER_2X2, PACKED),
    ("gemma3_text-two-ropes", replace(GATHER_4, recompute="selective"), RECIPE),
    ("gpt2", with_axes(GATHER_2, 2, 1, 1, 1, True), PACKED),
    ("bloom-tied", RING_2, SEEN),
    ("llama", ULYSSES_4, PADDED),
    ("bert-pretraining", RING_2X2, ODD),
    ("t5-gated", replace(RING_2, recompute="full"), RECIPE),
    ("t5-gated", with_axes(ULYSSES_2, 1, 2, 1, 1), ODD),
    ("llama-1kv", ULYSSES_4, RECIPE),
    ("llama-uneven", with_axes(RING_2, 2, 1, 1, 1, True), ODD_PACKED),
    ("qwen2-2kv", with_axes(ULYSSES_2, 2, 1, 1, 1, True), ODD),
    (EXPERTS, replace(RING_2, expert=2, recompute="full"), SCALE),
    (EXPERTS, replace(with_axes(ULYSSES_2, 2, 1, 1, 1, True), expert=2), ODD_PACKED),
]


def everything() -> list[Run]:
    """Each family at each place, with each kind of rows, recomputed and not; the gradient's norm clipped and not."""
    found = [(case, place, SCALE) for case in FAMILIES for place in PLACES]
    found += [(case, place, RECIPE) for case in FEW_KEY_HEADS for place in PLACES]
    found += [
        (case, replace(place, recompute=mode), RECIPE)
        for case in (*FAMILIES, *FEW_KEY_HEADS)
        for place in (*TWO, GATHER_2X2, RING_2X2, with_axes(RING_2, 2, 1, 1, 1, True), with_axes(RING_2, 1, 2, 1, 1))
        for mode in ("selective", "full")
    ]
    found += [(case, place, ODD) for case in (*FAMILIES, *FEW_KEY_HEADS) for place in PLACES]
    found += [(case, place, recipe) for case in DECODERS for place in PLACES for recipe in (PACKED, ODD_PACKED, SEEN)]
    found += [(case, place, PADDED) for case in DECODERS if case != "bloom-tied" for place in PLACES]
    found += [
        (EXPERTS, replace(place, recompute=mode), recipe)
        for place in EXPERT_PLACES
        for mode in MODES
        for recipe in (SCALE, PACKED, ODD, PADDED)
    ]
    found += [("qwen3", place, replace(SCALE, grad_clip=0.0)) for place in PLACES]
    found += [("llama", with_axes(place, 1, 1, 1, zero), SCALE) for place in (*TWO, *FOUR) for zero in (0, 2, 3)]
    return [*found, *UNUSUAL]


def names(runs: Iterable[Run]) -> list[Any]:
    return [pytest.param(*run, id=f"{run[0]}-{run[1]}-{_named(run[2])}") for run in runs]


def _named(recipe: Recipe) -> str:
    parts = (
        "packed" * recipe.packed,
        "padded" * recipe.attention_mask,
        "seen" * (not recipe.labels_first),
        f"{recipe.length}",
        f"eps{recipe.eps:g}",
    )
    return "-".join(part for part in (*parts, "unclipped" * (not recipe.grad_clip)) if part)


def check(case: str, place: Place, recipe: Recipe, references: Any) -> None:
    directory, reference = references(case, recipe)
    errors = relative_errors(train_ours(directory, place, recipe), reference)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(("case", "place", "recipe"), names(SAMPLE))
def test_five_steps_equal_transformers(case: str, place: Place, recipe: Recipe, references: Any) -> None:
    check(case, place, recipe, references)


IN_TILES: list[Run] = [
    ("llama", GATHER_2, ODD_PACKED),
    ("gemma3_text-two-ropes", replace(GATHER_2, recompute="selective"), RECIPE),
    ("bloom-tied", GATHER_2, SEEN),
]


@pytest.mark.parametrize(("case", "place", "recipe"), names(IN_TILES))
def test_in_tiles_of_queries(
    case: str, place: Place, recipe: Recipe, references: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_queries_of_a_tile(monkeypatch, 5)
    check(case, place, recipe, references)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place", "recipe"), names(run for run in everything() if run not in SAMPLE))
def test_every_combination_equals_transformers(case: str, place: Place, recipe: Recipe, references: Any) -> None:
    check(case, place, recipe, references)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("llama", RING_2X2),
        *(
            pytest.param("llama", place, marks=pytest.mark.sweep)
            for place in (
                *(*TWO, GATHER_2X2, with_axes(GATHER_2, 2, 1, 1, 2, True)),
                *(with_axes(RING_2, 1, 1, 1, 3), with_axes(RING_2, 1, 2, 1, 1)),
            )
        ),
    ],
    ids=str,
)
def test_bf16_stays_near_a_bf16_reference(case: str, place: Place, references: Any) -> None:
    """What a rank gets for other ranks' queries is summed in fp32. Seen: loss 3e-4, norm 1.4e-2, weights 1e-2."""
    recipe = replace(RECIPE, precision="bf16")
    directory, reference = references(case, recipe)
    errors = relative_errors(train_ours(directory, place, recipe), reference)
    assert all(errors[name] < bound for name, bound in BF16_BOUNDS.items()), errors


def test_the_sample_covers_families_methods_and_axes() -> None:
    """Every family, method and kind of rows, each other axis, all recomputation, and all of a rank's keys behind
    padding."""
    cases, places, recipes = zip(*SAMPLE)
    assert {*FAMILIES, *FEW_KEY_HEADS, EXPERTS} == set(cases)
    assert {RECIPE, SCALE, PACKED, ODD, ODD_PACKED, PADDED, SEEN} == set(recipes)
    assert {(place.cp, place.method, place.ulysses) for place in (*TWO, *FOUR)} == {
        (place.cp, place.method, place.ulysses) for place in places
    }
    assert {place.recompute for place in places} == set(MODES)
    assert {(place.tp, place.pp, place.dp) for place in places} >= {(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)}
