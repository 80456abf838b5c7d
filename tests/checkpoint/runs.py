"""Runs of a few steps that are saved at one layout and gone on with at another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.parallel.grid import Grid
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import run_grid

CUT = 2  # steps before the save
KINDS = ("master", "exp_avg", "exp_avg_sq")  # AdamW's state of every trained element

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def offloaded(place: Place) -> Place:
    """The same with optimizer state, and under ZeRO-3 parameters, on the CPU by DeepSpeed's offload."""
    offload: dict[str, Any] = {"stage": place.zero, "offload_optimizer": {"device": "cpu"}}
    if place.zero == 3:
        offload["offload_param"] = {"device": "cpu"}
    return replace(place, extra=(("zero_optimization", offload),))


def steps(engine: Any, model: Any, grid: Grid, place: Place, recipe: Recipe, first: int, last: int) -> Curve:
    """Losses and gradient norms of the steps from `first` on, 0-based, before `last`."""
    found = []
    for step in range(first, last):
        batches = micro_batches(grid, place, recipe, step, model.family.model_type)
        result = engine.train_step(batches, recipe.lr)
        found.append((result.loss, result.grad_norm))
    return found


def save_run(
    grid: Grid, directory: Path, place: Place, recipe: Recipe, folder: Path, asynchronous: bool = True
) -> Curve:
    """The run from `directory`'s weights, saved after `CUT` steps, and to its end without another word."""
    engine, model = engine_on(grid, directory, place, recipe)
    saver = Saver(engine, model, SaveOptions(folder, asynchronous=asynchronous), Origin())
    curve = steps(engine, model, grid, place, recipe, 0, CUT)
    assert saver.save(Progress(step=CUT, applied=CUT)) is None
    curve += steps(engine, model, grid, place, recipe, CUT, recipe.steps)
    saved = saver.wait()
    assert saved is not None and saved.step == CUT
    return curve


def resume_run(grid: Grid, checkpoint: Path, place: Place, recipe: Recipe) -> Curve:
    """The steps after the save."""
    engine, model = engine_on(grid, checkpoint, place, recipe)
    load_state(engine, StateReader(checkpoint))
    return steps(engine, model, grid, place, recipe, CUT, recipe.steps)


def save_again(grid: Grid, checkpoint: Path, place: Place, recipe: Recipe, folder: Path) -> None:
    """Load a checkpoint at another layout and save it there, without a step between."""
    engine, model = engine_on(grid, checkpoint, place, recipe)
    load_state(engine, StateReader(checkpoint))
    saver = Saver(engine, model, SaveOptions(folder), Origin())
    assert saver.save(Progress(step=CUT, applied=CUT)) is None
    assert saver.wait() is not None


def saved_at(directory: Path, place: Place, recipe: Recipe, folder: Path, asynchronous: bool = True) -> Curve:
    return run_grid(save_run, place.layout, directory, place, recipe, folder, asynchronous)[0]


def resumed_at(checkpoint: Path, place: Place, recipe: Recipe) -> Curve:
    return run_grid(resume_run, place.layout, checkpoint, place, recipe)[0]


def apart(one: Curve, other: Curve) -> tuple[float, float]:
    """Largest relative differences of losses and of gradient norms."""
    assert len(one) == len(other) > 0
    return tuple(max(abs(a[i] / b[i] - 1) for a, b in zip(one, other)) for i in range(2))  # type: ignore[return-value]
