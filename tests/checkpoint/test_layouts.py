"""Saved at one layout, gone on with at another: the losses and norms of transformers' uninterrupted single process.

The model's head is tied to its embedding, over two pipeline stages where there are as many, and its vocabulary of 131
is padded wherever tensor ranks divide it. There are two parameter groups: weights that decay, and norms and biases.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.reader import first_damage
from tests.checkpoint.runs import CUT, Curve, apart, offloaded, resumed_at, save_again, saved_at
from tests.halves import swept
from tests.parity.cases import Recipe
from tests.parity.context_cases import GATHER_2, RING_2X2, ULYSSES_2, with_axes
from tests.parity.ours import Place
from tests.ranks import run_grid

RECIPE = Recipe(steps=4)
PLACES = {
    "alone": Place(1, 1, 1, 0),
    "alone-z1": Place(1, 1, 1, 1),
    "dp2-z0": Place(1, 1, 2, 0),
    "tp2-z0": Place(2, 1, 1, 0),
    "dp2-z2": Place(1, 1, 2, 2),
    "dp2-z3": Place(1, 1, 2, 3),
    "dp4-z1": Place(1, 1, 4, 1),
    "dp4-z3": Place(1, 1, 4, 3),
    "tp2-sp": Place(2, 1, 1, 1, True),
    "tp4": Place(4, 1, 1, 1),
    "tp2-dp2-z2": Place(2, 1, 2, 2, True),
    "tp2-dp2-z3": Place(2, 1, 2, 3),
    "pp2": Place(1, 2, 1, 1),
    "pp4": Place(1, 4, 1, 1),
    "pp2-dp2": Place(1, 2, 2, 1),
    "tp2-pp2-sp": Place(2, 2, 1, 1, True),
    "cp2-tp2-sp": with_axes(GATHER_2, 2, 1, 1, 1, True),
    "cp2-dp2-z3": with_axes(ULYSSES_2, 1, 1, 2, 3),
    "cp4": RING_2X2,
    "dp2-z1-offload": offloaded(Place(1, 1, 2, 1)),
    "dp2-z3-offload": offloaded(Place(1, 1, 2, 3)),
}
# Every kind of layout once as the source, and once as the target: what is saved knows no layout.
PAIRS = [
    ("alone", "tp2-pp2-sp"),
    ("alone", "cp4"),
    ("tp2-sp", "alone"),
    ("tp2-z0", "tp2-dp2-z3"),
    ("dp2-z3", "tp4"),
    ("tp2-pp2-sp", "dp2-z3-offload"),
    ("tp2-dp2-z3", "dp2-z1-offload"),
    ("dp4-z1", "pp2-dp2"),
    ("dp2-z3-offload", "dp2-z2"),
    ("cp4", "dp2-z3"),
]
MORE_PAIRS = [
    ("tp2-sp", "tp4"),
    ("tp2-sp", "pp2-dp2"),
    ("dp2-z3", "alone-z1"),
    ("dp2-z3", "tp2-pp2-sp"),
    ("tp2-pp2-sp", "dp4-z1"),
    ("tp2-dp2-z3", "pp4"),
    ("dp4-z1", "pp2"),
    ("dp4-z1", "dp2-z3"),
    ("cp4", "alone"),
    ("alone", "tp2-sp"),
    ("alone", "tp2-dp2-z3"),
    ("alone", "dp2-z0"),
    ("tp2-sp", "tp2-z0"),
    ("dp2-z3", "dp4-z3"),
    ("dp2-z3", "dp2-z2"),
    ("tp2-pp2-sp", "alone"),
    ("tp2-pp2-sp", "tp2-dp2-z2"),
    ("tp2-dp2-z3", "dp2-z0"),
    ("dp4-z1", "tp2-sp"),
    ("dp2-z3-offload", "tp2-sp"),
    ("cp4", "cp2-dp2-z3"),
    ("tp2-dp2-z3", "cp2-tp2-sp"),
]


@pytest.fixture(scope="module")
def saved(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a layout -> (checkpoint, the curve of the run that was not cut)."""
    made: dict[str, tuple[Path, Curve]] = {}

    def get(name: str) -> tuple[Path, Curve]:
        if name not in made:
            directory, _ = references("qwen2-tied", RECIPE)
            folder = tmp_path_factory.mktemp(name)
            curve = saved_at(directory, PLACES[name], RECIPE, folder, asynchronous=len(made) % 2 == 0)
            made[name] = folder / name_of(CUT), curve
        return made[name]

    return get


@pytest.mark.parametrize(("source", "target"), [*PAIRS, *swept(*MORE_PAIRS)])
def test_another_layout_goes_on_where_one_stopped(source: str, target: str, saved: Any, references: Any) -> None:
    checkpoint, _ = saved(source)
    _, reference = references("qwen2-tied", RECIPE)
    expected = list(zip(reference["losses"], reference["norms"]))[CUT:]
    loss, norm = apart(resumed_at(checkpoint, PLACES[target], RECIPE), expected)
    assert loss < 2e-5 and norm < 1e-4, (loss, norm)


@pytest.mark.parametrize(
    "name", ["tp2-z0", "dp2-z3", "tp2-pp2-sp", "dp2-z3-offload", *swept("alone", "tp2-sp", "dp4-z1", "cp4")]
)
def test_the_same_layout_goes_on_bit_for_bit(name: str, saved: Any) -> None:
    checkpoint, curve = saved(name)
    assert first_damage(checkpoint) is None
    assert resumed_at(checkpoint, PLACES[name], RECIPE) == curve[CUT:]


def test_every_kind_of_layout_is_a_source_and_a_target() -> None:
    for places in ([PLACES[source] for source, _ in PAIRS], [PLACES[target] for _, target in PAIRS]):
        assert {place.zero for place in places} >= {0, 1, 3}
        assert {axis for axis in ("tp", "pp", "dp", "cp") for place in places if getattr(place, axis) > 1} == {
            *("tp", "pp", "dp", "cp")
        }
        assert any(place.extra for place in places), "offloaded"
    assert len({*PAIRS, *MORE_PAIRS}) == len(PAIRS) + len(MORE_PAIRS)


def test_saved_by_one_rank_between_it_goes_on_bit_for_bit(saved: Any, tmp_path: Path) -> None:
    """The parts of four context ranks and the whole of one have the same content, and the same way back."""
    checkpoint, curve = saved("cp4")
    run_grid(save_again, PLACES["alone"].layout, checkpoint, PLACES["alone"], RECIPE, tmp_path)
    assert resumed_at(tmp_path / name_of(CUT), PLACES["cp4"], RECIPE) == curve[CUT:]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("source", "target"),
    [(one, other) for one in PLACES for other in PLACES if (one, other) not in (*PAIRS, *MORE_PAIRS)],
)
def test_every_layout_goes_on_from_every_other(source: str, target: str, saved: Any, references: Any) -> None:
    test_another_layout_goes_on_where_one_stopped(source, target, saved, references)
