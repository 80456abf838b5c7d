"""The average of the weights: at every layout, in checkpoints, in exports, and after steps that are skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ds.checkpoint.convert import export_hf
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.config import EmaSection
from megatron_ds.engine.optimizers import EMA, WeightAverage, begin_average
from megatron_ds.engine.optimizers.lion import GuardedLion
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime.averaged_weights import averaged_weights
from tests.checkpoint.runs import CUT, offloaded, resumed_at, steps
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on
from tests.ranks import run_grid

RECIPE = Recipe(lr=1e-2)
BF16 = Recipe(lr=1e-2, precision="bf16")
DECAY, START = 0.7, 1
CASE = "qwen2-tied"
PLACES = {
    "alone": Place(1, 1, 1, 0),
    "dp2-z1": Place(1, 1, 2, 1),
    "dp2-z2": Place(1, 1, 2, 2),
    "tp2-sp": Place(2, 1, 1, 1, True),
    "tp2-dp2-z3": Place(2, 1, 2, 3),
    "pp2": Place(1, 2, 1, 1),
    "dp2-z3-offload": offloaded(Place(1, 1, 2, 3)),
}


def averaging(place: Place) -> Place:
    return Place(**{**vars(place), "settings": (("ema", EmaSection(decay=DECAY, start_step=START)),)})


def whole(engine: Any) -> dict[str, Tensor]:
    return {name: full.float().clone() for name, full in engine.full_parameters() if full is not None}


def _weights_of_steps(grid: Grid, directory: Path) -> list[dict[str, Tensor]]:
    """The weights after each step of a run without an average, on one rank."""
    engine, model = engine_on(grid, directory, PLACES["alone"], RECIPE)
    found = []
    for step in range(RECIPE.steps):
        steps(engine, model, grid, PLACES["alone"], RECIPE, step, step + 1)
        found.append(whole(engine))
    return found


def _averages(grid: Grid, directory: Path, place: Place, recipe: Recipe, folder: Path | None) -> dict[str, Tensor]:
    """The average after the last step; with a folder the run is saved after `CUT` steps."""
    engine, model = engine_on(grid, directory, averaging(place), recipe)
    if folder is None:
        load_state(engine, StateReader(directory))
        steps(engine, model, grid, place, recipe, CUT, recipe.steps)
    else:
        saver = Saver(engine, model, SaveOptions(folder, asynchronous=False), Origin())
        steps(engine, model, grid, place, recipe, 0, CUT)
        saver.save(Progress(step=CUT, applied=CUT))
        saver.wait()
        steps(engine, model, grid, place, recipe, CUT, recipe.steps)
    trained = whole(engine)
    with averaged_weights(engine):
        averaged = whole(engine)
    assert all(torch.equal(trained[name], full) for name, full in whole(engine).items()), "exchanged back"
    return averaged


@pytest.fixture(scope="module")
def expected(references: Any) -> list[dict[str, Tensor]]:
    """The average after each step by the formula, in fp64."""
    directory, _ = references(CASE, RECIPE)
    averages: list[dict[str, Tensor]] = []
    for step, weights in enumerate(run_grid(_weights_of_steps, PLACES["alone"].layout, directory)[0], start=1):
        exact = {name: one.double() for name, one in weights.items()}
        if step > START:
            exact = {name: DECAY * averages[-1][name] + (1 - DECAY) * one for name, one in exact.items()}
        averages.append(exact)
    return averages


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


def check(source: str, target: str, references: Any, expected: Any, folder: Path) -> None:
    directory, _ = references(CASE, RECIPE)
    through = run_grid(_averages, PLACES[source].layout, directory, PLACES[source], RECIPE, folder)[0]
    assert furthest(through, expected[-1]) < 1e-5
    reader = StateReader(folder / name_of(CUT))
    saved = {name: reader.read_full(EMA, name, tuple(one.shape)) for name, one in through.items()}
    assert furthest(saved, expected[CUT - 1]) < 1e-5
    resumed = run_grid(_averages, PLACES[target].layout, reader.directory, PLACES[target], RECIPE, None)[0]
    assert furthest(resumed, expected[-1]) < 1e-5
    if source == target:
        assert all(torch.equal(one, through[name]) for name, one in resumed.items())


SAMPLE = [("tp2-sp", "tp2-dp2-z3"), ("pp2", "pp2")]


@pytest.mark.parametrize(("source", "target"), SAMPLE)
def test_the_average_is_the_formulas_at_every_layout(
    source: str, target: str, references: Any, expected: Any, tmp_path: Path
) -> None:
    check(source, target, references, expected, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("source", "target"), [(one, other) for one in PLACES for other in PLACES if (one, other) not in SAMPLE]
)
def test_the_average_is_the_formulas_between_all_layouts(
    source: str, target: str, references: Any, expected: Any, tmp_path: Path
) -> None:
    check(source, target, references, expected, tmp_path)


TRAPS = [pytest.param("average of the last weights", marks=pytest.mark.sweep), "begins too early", "not saved"]


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_seen(
    trap: str, references: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = references(CASE, RECIPE)
    place, real = PLACES["dp2-z2"], WeightAverage.update
    changes = {
        "average of the last weights": lambda self, optimizer, step: real(self, optimizer, 0),
        "begins too early": lambda self, optimizer, step: real(self, optimizer, step + 1),
        "not saved": real,
    }
    monkeypatch.setattr(WeightAverage, "update", changes[trap])
    run_grid(_averages, place.layout, directory, place, RECIPE, tmp_path)
    if trap == "not saved":
        monkeypatch.setattr(StateReader, "has", lambda self, kind, name: kind != EMA)
    found = run_grid(_averages, place.layout, tmp_path / name_of(CUT), place, RECIPE, None)[0]
    assert furthest(found, expected[-1]) > 1e-5


def test_a_skipped_step_does_not_move_it() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = GuardedLion([weight], lr=0.5)
    begin_average(optimizer, [weight])
    optimizer.average = WeightAverage(0.5, 0)
    for number, good in enumerate((True, False, True), start=1):
        optimizer.should_step = lambda good=good: good
        optimizer.begin_step(number)
        weight.grad = torch.ones(3)
        optimizer.step()
    assert weight.tolist() == [0.0] * 3
    assert optimizer.state[weight][EMA].tolist() == [0.375] * 3  # 1 -> 0.75 -> skipped -> 0.375


def test_exports_hold_the_average(references: Any, tmp_path: Path) -> None:
    """In the weights' dtype, rounded once; and without one the export is refused."""
    directory, _ = references(CASE, RECIPE)
    run_grid(_averages, PLACES["tp2-sp"].layout, directory, PLACES["tp2-sp"], BF16, tmp_path)
    checkpoint = tmp_path / name_of(CUT)
    reader = StateReader(checkpoint)
    average = reader.read_full(EMA, "exit.norm.weight", (32,))
    for dtype in (None, "float32"):
        export_hf(checkpoint, tmp_path / f"{dtype}", dtype, ema=True)
        (file,) = (tmp_path / f"{dtype}").glob("*.safetensors")
        found = load_file(file)["model.norm.weight"]
        assert torch.equal(found, average if dtype else average.bfloat16()), dtype
        assert not torch.equal(found.float(), reader.read_full("master", "exit.norm.weight", (32,)))
    with pytest.raises(CheckpointError, match=r"has no average of the weights, which --ema would write; remove --ema"):
        export_hf(directory, tmp_path / "none", ema=True)


def test_a_run_without_it_resumes_and_one_with_it_begins_one(references: Any, tmp_path: Path) -> None:
    directory, _ = references(CASE, RECIPE)
    place = PLACES["alone"]
    run_grid(_averages, place.layout, directory, place, RECIPE, tmp_path / "with")
    assert len(resumed_at(tmp_path / "with" / name_of(CUT), place, RECIPE)) == RECIPE.steps - CUT
