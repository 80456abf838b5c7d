"""Muon's momentum and AdamW's moments are saved at one layout and resumed at another.

Both runs orthogonalise in fp32, see tests/parity/test_muon.py, whose bounds these are.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.errors import CheckpointError
from tests.checkpoint.runs import CUT, Curve, apart, resumed_at, save_again, saved_at
from tests.parity.cases import Recipe
from tests.parity.ours import Place
from tests.parity.test_muon import EXPERTS, FOLDED, LLAMA, MATCH, PLACES
from tests.ranks import run_grid

ALONE = Place(1, 1, 1, 1)
RUNS = {
    **{f"llama-{name}": (LLAMA, PLACES[name]) for name in ("z0", "tp2-sp", "z3", "tp2-z3", "pp2-dp2", "offload-z3")},
    "experts-alone": (EXPERTS, ALONE),
    **{f"experts-{name}": (EXPERTS, FOLDED[name]) for name in ("ep2-dp2-z1", "ep2-dp2-z3")},
}
SAMPLE = [("llama-z3", "llama-tp2-sp"), ("experts-ep2-dp2-z1", "experts-alone")]
EVERYTHING = [(one, other) for one in RUNS for other in RUNS if one != other and RUNS[one][0] == RUNS[other][0]]


@pytest.fixture(scope="module")
def saved(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a run -> (checkpoint, the curve of the run that was not cut)."""
    made: dict[str, tuple[Path, Curve]] = {}

    def get(run: str) -> tuple[Path, Curve]:
        if run not in made:
            case, place = RUNS[run]
            folder = tmp_path_factory.mktemp(run)
            curve = saved_at(references(case, MATCH)[0], place, MATCH, folder)
            made[run] = folder / name_of(CUT), curve
        return made[run]

    return get


def check(source: str, target: str, saved: Any) -> None:
    checkpoint, curve = saved(source)
    assert StateReader(checkpoint).optimizer_kinds == {"step", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert resumed_at(checkpoint, RUNS[source][1], MATCH) == curve[CUT:], "bit for bit at the same layout"
    loss, norm = apart(resumed_at(checkpoint, RUNS[target][1], MATCH), curve[CUT:])
    assert loss < 1e-6 and norm < 1e-5, (loss, norm)


@pytest.mark.parametrize(("source", "target"), SAMPLE)
def test_another_layout_goes_on(source: str, target: str, saved: Any) -> None:
    check(source, target, saved)


@pytest.mark.sweep
@pytest.mark.parametrize(("source", "target"), [one for one in EVERYTHING if one not in SAMPLE])
def test_every_layout_goes_on_from_every_other(source: str, target: str, saved: Any) -> None:
    check(source, target, saved)


def test_saved_by_another_layout_between_it_goes_on_bit_for_bit(saved: Any, tmp_path: Path) -> None:
    checkpoint, curve = saved("llama-z3")
    run_grid(save_again, ALONE.layout, checkpoint, ALONE, MATCH, tmp_path)
    assert resumed_at(tmp_path / name_of(CUT), RUNS["llama-z3"][1], MATCH) == curve[CUT:]


def test_state_of_adamw_is_refused(references: Any, saved: Any, tmp_path: Path) -> None:
    directory, _ = references(LLAMA, Recipe())
    saved_at(directory, ALONE, Recipe(), tmp_path)
    for checkpoint, recipe, fix in (
        (tmp_path / name_of(CUT), MATCH, "try optimizer.name=adamw, or checkpoint.optimizer=reset"),
        (saved("llama-z3")[0], Recipe(), "try optimizer.name=muon, or checkpoint.optimizer=reset"),
    ):
        with pytest.raises(CheckpointError) as caught:
            resumed_at(checkpoint, ALONE, recipe)
        assert fix in str(caught.value)
