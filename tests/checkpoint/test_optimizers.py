"""The state of every optimizer is saved at one layout and resumed at another; other optimizers' state is refused."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint import load
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.load import continues_optimizer, load_state
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.engine.optimizers.adafactor import GuardedAdafactor
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.grid import Grid
from tests.checkpoint.runs import CUT, Curve, apart, offloaded, resumed_at, save_again, saved_at, steps
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on
from tests.parity.test_optimizers import CASES, RECIPES
from tests.ranks import run_grid

ALONE = Place(1, 1, 1, 1)
PLACES = {
    "alone": ALONE,
    "dp2-z0": Place(1, 1, 2, 0),
    "tp2-sp": Place(2, 1, 1, 1, True),
    "dp2-z2": Place(1, 1, 2, 2),
    "tp2-dp2-z3": Place(2, 1, 2, 3),
    "pp2-dp2": Place(1, 2, 2, 1),
    "dp2-z3-offload": offloaded(Place(1, 1, 2, 3)),
}
SAMPLE = [("sgd", "dp2-z2", "tp2-sp"), ("adafactor", "tp2-dp2-z3", "pp2-dp2")]
NEXT = dict(zip(PLACES, [*list(PLACES)[1:], "alone"]))  # every layout is saved at once, and resumed at once
EVERYTHING = [(name, one, other) for name in RECIPES for one, other in NEXT.items()]
KINDS = {
    "lion": {"exp_avg"},
    "sgd": {"momentum_buffer"},
    "sgd-plain": set[str](),
    "adafactor": {"step", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
    "adafactor-momentum": {"step", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
}


@pytest.fixture(scope="module")
def saved(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of an optimizer, name of a layout -> (checkpoint, the curve of the run that was not cut)."""
    made: dict[tuple[str, str], tuple[Path, Curve]] = {}

    def get(name: str, place: str) -> tuple[Path, Curve]:
        if (name, place) not in made:
            directory, _ = references(CASES[name], RECIPES[name])
            folder = tmp_path_factory.mktemp(f"{name}-{place}")
            curve = saved_at(directory, PLACES[place], RECIPES[name], folder)
            made[name, place] = folder / name_of(CUT), curve
        return made[name, place]

    return get


def check(name: str, source: str, target: str, saved: Any, references: Any) -> None:
    checkpoint, curve = saved(name, source)
    assert StateReader(checkpoint).optimizer_kinds == KINDS[name]
    assert resumed_at(checkpoint, PLACES[source], RECIPES[name]) == curve[CUT:], "bit for bit at the same layout"
    _, reference = references(CASES[name], RECIPES[name])
    expected = list(zip(reference["losses"], reference["norms"]))[CUT:]
    loss, norm = apart(resumed_at(checkpoint, PLACES[target], RECIPES[name]), expected)
    assert loss < 2e-5 and norm < 1e-4, (loss, norm)


@pytest.mark.parametrize(("name", "source", "target"), SAMPLE)
def test_another_layout_goes_on(name: str, source: str, target: str, saved: Any, references: Any) -> None:
    check(name, source, target, saved, references)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "source", "target"), [one for one in EVERYTHING if one not in SAMPLE])
def test_every_layout_goes_on_from_another(name: str, source: str, target: str, saved: Any, references: Any) -> None:
    check(name, source, target, saved, references)


def test_saved_by_another_layout_between_it_goes_on_bit_for_bit(saved: Any, tmp_path: Path) -> None:
    checkpoint, curve = saved("sgd", "dp2-z2")
    run_grid(save_again, ALONE.layout, checkpoint, ALONE, RECIPES["sgd"], tmp_path)
    assert resumed_at(tmp_path / name_of(CUT), PLACES["dp2-z2"], RECIPES["sgd"]) == curve[CUT:]


def test_lost_state_is_seen(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_into(reader: Any, kind: str, *place: Any, real: Any = load._read_into) -> None:
        if kind == "master":
            real(reader, kind, *place)

    checkpoint, curve = saved("sgd", "dp2-z2")
    monkeypatch.setattr(load, "_read_into", read_into)
    assert apart(resumed_at(checkpoint, ALONE, RECIPES["sgd"]), curve[CUT:])[0] > 2e-5


def test_lost_means_of_rows_are_seen(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, curve = saved("adafactor", "tp2-dp2-z3")
    monkeypatch.setattr(GuardedAdafactor, "whole_state", lambda self, parameter: {})
    assert apart(resumed_at(checkpoint, ALONE, RECIPES["adafactor"]), curve[CUT:])[0] > 2e-5


# ---- another optimizer -----------------------------------------------------------------------------------------------


def _reset(grid: Grid, checkpoint: Path, recipe: Recipe) -> Curve:
    engine, model = engine_on(grid, checkpoint, ALONE, recipe)
    load_state(engine, StateReader(checkpoint), resets_optimizer=True)
    return steps(engine, model, grid, ALONE, recipe, CUT, recipe.steps)


def test_another_optimizer_is_refused_or_begins_empty(saved: Any) -> None:
    checkpoint, _ = saved("sgd", "dp2-z2")
    with pytest.raises(CheckpointError) as caught:
        resumed_at(checkpoint, ALONE, Recipe())
    expected = (
        f"optimizer.name=adamw keeps exp_avg, exp_avg_sq, step, and {checkpoint} has the state of another optimizer: "
        "momentum_buffer; try optimizer.name=sgd, or checkpoint.optimizer=reset, which begins with an empty state"
    )
    assert expected in str(caught.value)
    fresh = run_grid(_reset, ALONE.layout, checkpoint, Recipe())[0]
    assert len(fresh) == Recipe().steps - CUT


def test_reset_is_for_other_state_only(saved: Any) -> None:
    """A run that is started again with `reset` continues its own state, and an import has none."""
    reader = StateReader(saved("sgd", "dp2-z2")[0])
    assert continues_optimizer(reader, ("momentum_buffer",), "sgd", resets=True)
    assert not continues_optimizer(reader, ("exp_avg",), "lion", resets=True)
    with pytest.raises(CheckpointError, match=r"sgd keeps no state, .* try checkpoint\.optimizer=reset"):
        continues_optimizer(reader, (), "sgd", resets=False)
