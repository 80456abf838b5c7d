"""What else a checkpoint must carry: other families, half precision, what is frozen or unused, dropout's numbers."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megatron_ds.checkpoint import load, state
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.checkpoint.state import loss_scale, set_loss_scale
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.checkpoint.runs import CUT, Curve, apart, resume_run, resumed_at, saved_at, steps
from tests.halves import swept
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_config, session_of
from tests.ranks import run_grid, run_ranks

RECIPE = Recipe(steps=4)
BF16 = replace(RECIPE, precision="bf16")
ALONE, TP2, ZERO_3 = Place(1, 1, 1, 1), Place(2, 1, 1, 1, True), Place(1, 1, 2, 3)
PIPELINE = Place(2, 2, 1, 1, True)


@pytest.mark.parametrize(
    ("case", "source", "target"),
    [
        ("gpt2", TP2, ZERO_3),
        ("llama-1kv", Place(4, 1, 1, 1), Place(1, 2, 1, 1)),  # several ranks hold the same key head
        pytest.param("llama-1kv", Place(4, 1, 1, 1), Place(1, 2, 2, 1), marks=pytest.mark.sweep),
        pytest.param("bert-pretraining", ZERO_3, PIPELINE, marks=pytest.mark.sweep),
        pytest.param("bert-pretraining", PIPELINE, ALONE, marks=pytest.mark.sweep),
        pytest.param("roberta-masked", PIPELINE, ZERO_3, marks=pytest.mark.sweep),
        ("t5-tied-relu", PIPELINE, ZERO_3),  # tables and the embedding on several stages
        pytest.param("t5-tied-relu", PIPELINE, Place(2, 1, 2, 3), marks=pytest.mark.sweep),
        pytest.param("t5-tied-relu", ZERO_3, Place(1, 4, 1, 1), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_other_families(case: str, source: Place, target: Place, references: Any, tmp_path: Path) -> None:
    directory, reference = references(case, RECIPE)
    curve = saved_at(directory, source, RECIPE, tmp_path)
    expected = list(zip(reference["losses"], reference["norms"]))
    for found, part in ((curve, expected), (resumed_at(tmp_path / name_of(CUT), target, RECIPE), expected[CUT:])):
        loss, norm = apart(found, part)
        assert loss < 2e-5 and norm < 1e-4, (loss, norm)


@pytest.mark.parametrize("place", [ZERO_3, PIPELINE, Place(1, 1, 2, 2), *swept(TP2)], ids=str)
def test_bf16_goes_on_bit_for_bit(place: Place, references: Any, tmp_path: Path) -> None:
    """Weights in half precision, masters and moments in full: also with fp32 accumulation's other optimizer."""
    directory, _ = references("qwen2-tied", RECIPE)
    curve = saved_at(directory, place, BF16, tmp_path)
    assert resumed_at(tmp_path / name_of(CUT), place, BF16) == curve[CUT:]


@pytest.mark.parametrize("place", [PIPELINE, *swept(TP2)], ids=str)
@pytest.mark.parametrize(("source", "target"), [(BF16, RECIPE), (RECIPE, BF16)], ids=["to-fp32", "to-bf16"])
def test_precision_may_change(source: Recipe, target: Recipe, place: Place, references: Any, tmp_path: Path) -> None:
    """What counts are the fp32 masters, which both have: at any layout the next steps are those of one process."""
    directory, _ = references("qwen2-tied", RECIPE)
    saved_at(directory, ALONE, source, tmp_path)
    expected = resumed_at(tmp_path / name_of(CUT), ALONE, target)
    loss, norm = apart(resumed_at(tmp_path / name_of(CUT), place, target), expected)
    bounds = (2e-5, 1e-4) if target.precision == "fp32" else (1e-3, 2e-2)
    assert loss < bounds[0] and norm < bounds[1], (loss, norm)


def _masters(grid: Grid, checkpoint: Path, place: Place, recipe: Recipe) -> dict[str, torch.Tensor]:
    from tests.parity.ours import engine_on

    engine, _ = engine_on(grid, checkpoint, place, recipe)
    load_state(engine, StateReader(checkpoint))
    return {name: whole.float().clone() for name, whole in engine.full_parameters() if whole is not None}


@pytest.mark.parametrize("place", [ZERO_3, PIPELINE, *swept(ALONE, TP2)], ids=str)
def test_fp32_gets_the_masters_of_bf16_and_not_its_weights(place: Place, references: Any, tmp_path: Path) -> None:
    directory, _ = references("qwen2-tied", RECIPE)
    saved_at(directory, Place(1, 1, 2, 2), BF16, tmp_path)
    checkpoint = tmp_path / name_of(CUT)
    reader = StateReader(checkpoint)
    for name, weight in run_grid(_masters, place.layout, checkpoint, place, RECIPE)[0].items():
        master = reader.read_full("master", name, tuple(weight.shape))
        assert torch.equal(weight, master), name
        assert not torch.equal(master, master.bfloat16().float()), name


# ---- frozen and unused -----------------------------------------------------------------------------------------------

FROZEN = frozenset({"embedding.weight", "blocks.1.mlp.up.weight", "blocks.2.attention_norm.weight"})


def _engine(grid: Grid, directory: Path, place: Place, recipe: Recipe, **changes: Any) -> tuple[Any, Any]:
    """With changes to the loaded model."""
    model = replace(load_model(directory), **changes)
    return session_of(grid).build_engine(model, engine_config(place, recipe)).engine, model.hf


def _frozen_run(grid: Grid, directory: Path, place: Place, recipe: Recipe, folder: Path | None) -> Curve:
    """With a folder: five steps, saved on the way; without: those after the save."""
    engine, model = _engine(grid, directory, place, recipe, frozen=FROZEN)
    if folder is None:
        load_state(engine, StateReader(directory))
        return steps(engine, model, grid, place, recipe, CUT, recipe.steps)
    before = {name: whole.clone() for name, whole in engine.full_parameters() if whole is not None}
    curve = steps(engine, model, grid, place, recipe, 0, CUT)
    saver = Saver(engine, model, SaveOptions(folder), Origin())
    saver.save(Progress(step=CUT))
    after = {name: whole for name, whole in engine.full_parameters() if whole is not None}
    assert {name for name in after if torch.equal(before[name], after[name])} == (FROZEN if grid.rank == 0 else set())
    curve += steps(engine, model, grid, place, recipe, CUT, recipe.steps)
    saver.wait()
    return curve


@pytest.mark.parametrize(
    ("place", "recipe"),
    [
        (TP2, RECIPE),
        (ZERO_3, BF16),
        pytest.param(PIPELINE, BF16, marks=pytest.mark.sweep),
        pytest.param(ALONE, RECIPE, marks=pytest.mark.sweep),
        pytest.param(PIPELINE, RECIPE, marks=pytest.mark.sweep),
        pytest.param(TP2, BF16, marks=pytest.mark.sweep),
        pytest.param(ZERO_3, RECIPE, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_what_is_frozen_stays_and_is_there_again(place: Place, recipe: Recipe, references: Any, tmp_path: Path) -> None:
    directory, _ = references("qwen2-tied", RECIPE)
    curve = run_grid(_frozen_run, place.layout, directory, place, recipe, tmp_path)[0]
    checkpoint = tmp_path / name_of(CUT)
    assert not FROZEN & set(StateReader(checkpoint).progress.trained)
    assert run_grid(_frozen_run, place.layout, checkpoint, place, recipe, None)[0] == curve[CUT:]
    other = ZERO_3 if place == PIPELINE else PIPELINE
    loss, norm = apart(run_grid(_frozen_run, other.layout, checkpoint, other, recipe, None)[0], curve[CUT:])
    bounds = (2e-5, 1e-4) if recipe is RECIPE else (1e-3, 2e-2)
    assert loss < bounds[0] and norm < bounds[1], (loss, norm)


def _without_gradient(engine: Any) -> None:
    """The last norm's weight takes part in nothing that is differentiated: its gradient stays None."""
    (norm,) = [module for name, module in engine.deepspeed.module.named_modules() if name == "exit.norm"]
    norm.enter = torch.Tensor.detach


def _unused_run(grid: Grid, directory: Path, place: Place, folder: Path | None) -> Curve:
    engine, model = _engine(grid, directory, place, RECIPE)
    _without_gradient(engine)
    if folder is None:
        load_state(engine, StateReader(directory))
        return steps(engine, model, grid, place, RECIPE, CUT, RECIPE.steps)
    saver = Saver(engine, model, SaveOptions(folder, asynchronous=False), Origin())
    curve = steps(engine, model, grid, place, RECIPE, 0, CUT)
    saver.save(Progress(step=CUT))
    saver.wait()
    return curve + steps(engine, model, grid, place, RECIPE, CUT, RECIPE.steps)


@pytest.mark.parametrize(
    "place",
    [Place(1, 1, 1, 0), ZERO_3, *(pytest.param(Place(1, 1, 2, zero), marks=pytest.mark.sweep) for zero in (1, 2))],
    ids=str,
)
def test_a_parameter_that_is_not_used(place: Place, references: Any, tmp_path: Path) -> None:
    directory, _ = references("llama", RECIPE)
    curve = run_grid(_unused_run, place.layout, directory, place, tmp_path)[0]
    checkpoint = tmp_path / name_of(CUT)
    assert run_grid(_unused_run, place.layout, checkpoint, place, None)[0] == curve[CUT:]
    other = Place(1, 1, 1, 0) if place == ZERO_3 else ZERO_3
    loss, norm = apart(run_grid(_unused_run, other.layout, checkpoint, other, None)[0], curve[CUT:])
    assert loss < 2e-5 and norm < 1e-4, (loss, norm)


# ---- random numbers, loss scale --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [PIPELINE, *(pytest.param(one, marks=pytest.mark.sweep) for one in (Place(2, 1, 2, 1, True), ZERO_3))],
    ids=str,
)
def test_dropout_goes_on_with_the_masks_that_it_would_have_drawn(place: Place, references: Any, tmp_path: Path) -> None:
    directory, reference = references("gpt2", RECIPE)
    config = (directory / "config.json").read_text()
    wet = tmp_path / "wet"
    wet.mkdir()
    (wet / "config.json").write_text(config.replace('pdrop": 0.0', 'pdrop": 0.2'))
    (wet / "model.safetensors").symlink_to(directory / "model.safetensors")
    curve = saved_at(wet, place, RECIPE, tmp_path / "out")
    dry = list(zip(reference["losses"], reference["norms"]))
    assert apart(curve, dry)[0] > 1e-3, "there must be dropout"
    assert resumed_at(tmp_path / "out" / name_of(CUT), place, RECIPE) == curve[CUT:]


def test_the_loss_scale_goes_on() -> None:
    """fp16 does not run on a CPU; its scale is a few numbers of DeepSpeed's scaler."""

    def engine() -> Any:
        scaler = DynamicLossScaler(2.0**16, 2, 1.0, 2, False)
        return SimpleNamespace(deepspeed=SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler)))

    def after_overflows(info: Any) -> Any:
        found = engine()
        for overflow in (True, True, True, False):
            found.deepspeed.optimizer.loss_scaler.update_scale(overflow)
        return found

    (first,), second = run_ranks(after_overflows, 1), engine()
    set_loss_scale(second, loss_scale(first))
    assert vars(second.deepspeed.optimizer.loss_scaler) == vars(first.deepspeed.optimizer.loss_scaler)
    assert loss_scale(first)["cur_scale"] != 2.0**16


# ---- traps -----------------------------------------------------------------------------------------------------------


def _no_refresh(monkeypatch: Any) -> None:
    monkeypatch.setattr(load, "refresh_weights", lambda engine: None)


def _reads_only(monkeypatch: Any, *kinds: str) -> None:
    def read_into(reader: Any, kind: str, *place: Any, real: Any = load._read_into) -> None:
        if kind in kinds:
            real(reader, kind, *place)

    monkeypatch.setattr(load, "_read_into", read_into)


def _no_moments(monkeypatch: Any) -> None:
    _reads_only(monkeypatch, "master")


def _no_second_moments(monkeypatch: Any) -> None:
    _reads_only(monkeypatch, "master", "exp_avg")


def _no_masters(monkeypatch: Any) -> None:
    _reads_only(monkeypatch, "exp_avg", "exp_avg_sq")


def _no_steps(monkeypatch: Any) -> None:
    monkeypatch.setattr(StateReader, "steps", lambda self, name: 0.0)


def _wrong_rank(monkeypatch: Any) -> None:
    def of_first_rank(local: Any, spec: Any, axes: Any, real: Any = state.in_full_tensor) -> Any:
        return real(local, spec, {name: replace(axis, rank=0) for name, axis in axes.items()})

    monkeypatch.setattr(state, "in_full_tensor", of_first_rank)


TRAPS = {
    "the weights are not those of the masters": (_no_refresh, BF16, RECIPE),
    "no moments": (_no_moments, RECIPE, RECIPE),
    "no second moments": (_no_second_moments, RECIPE, RECIPE),
    "no masters": (_no_masters, BF16, RECIPE),
    "steps begin at 0": (_no_steps, RECIPE, RECIPE),
    "shards of another rank": (_wrong_rank, RECIPE, RECIPE),
}


@pytest.fixture(scope="module")
def alone(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(recipe of a run on one rank, recipe of the run after it) -> (checkpoint, the curve of that run on two ranks)."""
    checkpoints: dict[Recipe, Path] = {}

    @cache
    def get(source: Recipe, target: Recipe) -> tuple[Path, Curve]:
        if source not in checkpoints:
            directory, folder = references("qwen2-tied", RECIPE)[0], tmp_path_factory.mktemp("alone")
            saved_at(directory, ALONE, source, folder)
            checkpoints[source] = folder / name_of(CUT)
        return checkpoints[source], resumed_at(checkpoints[source], TP2, target)

    return get


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_seen(trap: str, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake in reading moves the curve further than the bounds allow."""
    put_in, source, target = TRAPS[trap]
    checkpoint, expected = alone(source, target)
    put_in(monkeypatch)
    loss, norm = apart(run_grid(resume_run, TP2.layout, checkpoint, TP2, target)[0], expected)
    assert loss > 2e-5 or norm > 1e-4, (loss, norm)
