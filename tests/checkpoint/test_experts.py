"""Mixtures of experts: what one layout of expert ranks has saved is read by every other, bit for bit.

The model has 8 experts a layer, of 4 layers the first is dense, a shared expert, and a bias of the choice that is no
parameter: it has no master, and is fp32 in every file.
"""

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ds.checkpoint import masters
from megatron_ds.checkpoint.convert import export_hf
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.masters import check_masters
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader, first_damage
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.checkpoint.state import owned_shards, slices
from megatron_ds.engine.optimizer_shards import optimizer_shards
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weights import HFWeights
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.checkpoint.runs import CUT, KINDS, Curve, apart, offloaded, steps
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_config, session_of
from tests.ranks import run_grid

CASE = "glm4_moe-dense-first"
RECIPE = Recipe(steps=3)
BF16 = replace(RECIPE, precision="bf16")
BIAS_RATE = 0.02


def _place(t: int, e: int | None, p: int, d: int, zero: int, **keys: Any) -> Place:
    extra = (("zero_optimization", {"stage": zero, **keys}),) if keys else ()
    return Place(t, p, d, zero, sp=t > 1, extra=extra, expert=e)


PLACES = {
    "alone": _place(1, 1, 1, 1, 1),
    "e1-d2": _place(1, 1, 1, 2, 1),
    "e2-d2": _place(1, 2, 1, 2, 1),
    "e4-d4": _place(1, 4, 1, 4, 1),
    "t2-e1": _place(2, 1, 1, 1, 1),
    "t2-e2": _place(2, None, 1, 2, 1),
    "t2-e4": _place(2, 4, 1, 2, 1),
    "p2-e1": _place(1, 1, 2, 2, 1),
    "p2-e2": _place(1, 2, 2, 2, 1),
    "p2-e4": _place(1, 4, 2, 4, 1),
    "p2-t2-e1": _place(2, 1, 2, 1, 1),
    "p2-t2-e2": _place(2, None, 2, 1, 1),
    "p2-t2-e4": _place(2, 4, 2, 2, 1),
    "e1-d2-z3": _place(1, 1, 1, 2, 3),
    "e2-d4-z3": _place(1, 2, 1, 4, 3),
    "e4-d4-z3": _place(1, 4, 1, 4, 3),
    "t2-e1-z3": _place(2, 1, 1, 2, 3),
    "t2-e2-z3": _place(2, None, 1, 2, 3),
    "t2-e4-z3": _place(2, 4, 1, 2, 3),
    "e2-d4-z0": _place(1, 2, 1, 4, 0),
    "t2-e4-z0": _place(2, 4, 1, 2, 0),
    "e2-d4-z2": _place(1, 2, 1, 4, 2),
    "e2-d4-z2-round": _place(1, 2, 1, 4, 2, round_robin_gradients=True),
    "e2-d2-offload": offloaded(_place(1, 2, 1, 2, 1)),
    "t2-e4-z3-offload": offloaded(_place(2, 4, 1, 2, 3)),
}
LEGAL = [(one, name) for one in (RECIPE, BF16) for name in PLACES if one is RECIPE or PLACES[name].zero > 0]
BF16_CHAIN = ("p2-e2", "e2-d4-z3", "t2-e4")
CHAIN = ("t2-e4-z3", "p2-t2-e1", "e2-d4-z2-round", "p2-e2", "t2-e4-z0", "e2-d2-offload")
LONG_CHAIN = ("t2-e4-z3", "t2-e2", "p2-e2", "e2-d4-z3", "e4-d4", "t2-e4-z0", "e2-d2-offload", "p2-t2-e1")


def _engine(grid: Grid, directory: Path, place: Place, recipe: Recipe, **changes: Any) -> tuple[Any, Any]:
    model, changes = load_model(directory), {"moe_bias_rate": BIAS_RATE, **changes}
    return session_of(grid).build_engine(model, engine_config(place, recipe, **changes)).engine, model.hf


def _train_and_save(grid: Grid, directory: Path, place: Place, recipe: Recipe, folder: Path) -> Curve:
    """All steps, saved after `CUT`."""
    engine, model = _engine(grid, directory, place, recipe)
    saver = Saver(engine, model, SaveOptions(folder), Origin())
    curve = steps(engine, model, grid, place, recipe, 0, CUT)
    saver.save(Progress(step=CUT, applied=CUT))
    curve += steps(engine, model, grid, place, recipe, CUT, recipe.steps)
    saver.wait()
    return curve


def _resume(grid: Grid, checkpoint: Path, place: Place, recipe: Recipe) -> Curve:
    engine, model = _engine(grid, checkpoint, place, recipe)
    load_state(engine, StateReader(checkpoint))
    return steps(engine, model, grid, place, recipe, CUT, recipe.steps)


def _save_again(grid: Grid, checkpoints: list[Path], place: Place, recipe: Recipe, folder: Path) -> dict[str, int]:
    """Load each checkpoint over what is there and save it; the elements of each parameter that this rank owns."""
    engine, model = _engine(grid, checkpoints[0], place, recipe)
    for number, checkpoint in enumerate(checkpoints):
        for shard in optimizer_shards(engine):
            for vector in (shard.master, *shard.moments.values()):
                vector.fill_(float("nan"))
        progress = load_state(engine, StateReader(checkpoint))
        saver = Saver(engine, model, SaveOptions(folder / str(number), asynchronous=number % 2 == 0), Origin())
        saver.save(progress)
        saver.wait()
    owned = Counter[str]()
    for shard in owned_shards(engine):
        owned[shard.name] += sum(part.numel for part, _ in slices(shard, engine.grid.model_axes))
    return owned


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight by its name on disk, every master and moment by its native name, and the steps of each."""
    reader, weights = StateReader(checkpoint), HFWeights(checkpoint, read_model(checkpoint))
    found = {name: tensor for file in weights.files for name, tensor in load_file(file).items()}
    for name in reader.progress.trained:
        row = weights.model.table[name]
        shape = row.op.native_shape(weights.model.axis_sizes)
        found.update({f"{kind} {name}": reader.read_full(kind, name, shape) for kind in KINDS})
        found[f"step {name}"] = torch.tensor(reader.steps(name))
        assert {reader.elements(kind, name) for kind in KINDS} == {found[f"master {name}"].numel()}, name
    return found


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def trained(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, recipe) -> (checkpoint, the curve of the run that was not cut)."""
    made: dict[tuple[str, Recipe], tuple[Path, Curve]] = {}

    def get(name: str, recipe: Recipe = RECIPE) -> tuple[Path, Curve]:
        if (name, recipe) not in made:
            directory, _ = references(CASE, RECIPE)
            folder, place = tmp_path_factory.mktemp(name), PLACES[name]
            curve = run_grid(_train_and_save, place.layout, directory, place, recipe, folder)[0]
            made[name, recipe] = folder / name_of(CUT), curve
        return made[name, recipe]

    return get


def _saved_again(checkpoints: list[Path], name: str, recipe: Recipe, folder: Path) -> list[Path]:
    """The same states, loaded and saved by a layout; each element of each parameter by one of its ranks."""
    place = PLACES[name]
    owned = sum(run_grid(_save_again, place.layout, checkpoints, place, recipe, folder, timeout_s=400.0), Counter())
    saved = [folder / str(number) / name_of(CUT) for number in range(len(checkpoints))]
    model, reader = HFWeights(saved[0], read_model(saved[0])).model, StateReader(saved[0])
    numels = {name: math.prod(row.op.native_shape(model.axis_sizes)) for name, row in model.table.items()}
    assert owned == {name: numels[name] for name in reader.progress.trained}
    assert numels.keys() - owned.keys() == {f"blocks.{layer}.mlp.router.choice_bias" for layer in (1, 2, 3)}
    return saved


@pytest.mark.parametrize(
    ("recipe", "chain"),
    [
        pytest.param(RECIPE, CHAIN, id="fp32"),
        pytest.param(RECIPE, LONG_CHAIN, id="long", marks=pytest.mark.sweep),
        pytest.param(BF16, BF16_CHAIN, id="bf16", marks=pytest.mark.sweep),
    ],
)
def test_each_layout_reads_what_another_wrote(recipe: Recipe, chain: Any, trained: Any, tmp_path: Path) -> None:
    checkpoint, _ = trained(chain[0], recipe)
    expected = _state(checkpoint)
    biases = [tensor for name, tensor in expected.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(bias.dtype == torch.float32 and bias.any() for bias in biases)
    for name in chain[1:]:
        (checkpoint,) = _saved_again([checkpoint], name, recipe, tmp_path / name)
        _same(_state(checkpoint), expected)
        check_masters(StateReader(checkpoint), sampled=False)
        assert first_damage(checkpoint) is None


@pytest.fixture(scope="module")
def rewritten(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, recipe) -> the checkpoint of a run on one rank, as that layout writes it."""
    made: dict[tuple[str, Recipe], Path] = {}

    def get(name: str, recipe: Recipe) -> Path:
        if (name, recipe) not in made:
            checkpoint, folder = trained("alone", recipe)[0], tmp_path_factory.mktemp(name)
            (made[name, recipe],) = _saved_again([checkpoint], name, recipe, folder)
        return made[name, recipe]

    return get


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("recipe", "name"), LEGAL, ids=lambda value: value if isinstance(value, str) else value.precision
)
def test_every_layout_writes_the_same(recipe: Recipe, name: str, trained: Any, rewritten: Any) -> None:
    _same(_state(rewritten(name, recipe)), _state(trained("alone", recipe)[0]))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("recipe", "name"), LEGAL, ids=lambda value: value if isinstance(value, str) else value.precision
)
def test_every_layout_reads_what_every_other_wrote(
    recipe: Recipe, name: str, trained: Any, rewritten: Any, tmp_path: Path
) -> None:
    expected = _state(trained("alone", recipe)[0])
    for one in _saved_again(
        [rewritten(other, recipe) for one, other in LEGAL if one == recipe], name, recipe, tmp_path
    ):
        _same(_state(one), expected)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("name", "recipe", "others"),
    [
        ("t2-e4-z3", RECIPE, ("p2-e2",)),
        ("p2-e2", BF16, ("e2-d4-z2-round",)),
        pytest.param("t2-e4", RECIPE, ("e2-d4-z3", "p2-t2-e4"), marks=pytest.mark.sweep),
        pytest.param("e2-d4-z3", RECIPE, ("t2-e2",), marks=pytest.mark.sweep),
        pytest.param("t2-e2", BF16, ("e2-d2",), marks=pytest.mark.sweep),
        pytest.param("t2-e4-z3-offload", RECIPE, ("alone",), marks=pytest.mark.sweep),
        pytest.param("e2-d4-z2-round", BF16, ("p2-t2-e1",), marks=pytest.mark.sweep),
        pytest.param("t2-e4-z0", RECIPE, ("e1-d2",), marks=pytest.mark.sweep),
    ],
    ids=lambda value: value if isinstance(value, str) else value.precision if isinstance(value, Recipe) else "",
)
def test_a_run_goes_on(name: str, recipe: Recipe, others: tuple[str, ...], trained: Any) -> None:
    """With the biases of the choice, which steps change: bit for bit at its own layout, nearly at another."""
    checkpoint, curve = trained(name, recipe)
    assert _resumed(checkpoint, name, recipe) == curve[CUT:]
    bounds = (2e-5, 1e-4) if recipe is RECIPE else (2e-3, 2e-2)
    for other in others:
        loss, norm = apart(_resumed(checkpoint, other, recipe), curve[CUT:])
        assert loss < bounds[0] and norm < bounds[1], (other, loss, norm)


def _resumed(checkpoint: Path, name: str, recipe: Recipe) -> Curve:
    return run_grid(_resume, PLACES[name].layout, checkpoint, PLACES[name], recipe)[0]


def test_an_export_rounds_the_masters_but_no_bias(trained: Any, tmp_path: Path) -> None:
    """In bf16 too: transformers keeps the biases of the choice in fp32."""
    checkpoint, _ = trained("p2-e2", BF16)
    weights, reader = HFWeights(checkpoint, read_model(checkpoint)), StateReader(checkpoint)
    to_hf, rounded = ToHF(weights.model), dict[str, torch.Tensor]()
    for name in reader.progress.trained:
        shape = weights.model.table[name].op.native_shape(weights.model.axis_sizes)
        rounded.update(to_hf.add(name, reader.read_full("master", name, shape)))
    on_disk = {name: tensor for file in weights.files for name, tensor in load_file(file).items()}
    for dtype in ("float32", "bfloat16", "float16"):
        export_hf(checkpoint, tmp_path / dtype, dtype)
        found = load_file(tmp_path / dtype / "model.safetensors")
        assert found.keys() == on_disk.keys() and len(found.keys() - rounded.keys()) == 3
        for name, tensor in found.items():
            wanted = rounded[name].to(getattr(torch, dtype)) if name in rounded else on_disk[name]
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
        assert all(on_disk[name].dtype == torch.float32 for name in found.keys() - rounded.keys())


def test_a_sample_of_masters_takes_single_experts(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of a layer are too large for a sample, so no expert would ever be in it."""
    checkpoint, _ = trained("p2-e2", BF16)
    monkeypatch.setattr(masters, "_SAMPLED_ELEMENTS", 2048)
    monkeypatch.setattr(masters, "_SAMPLED_PARAMETERS", 1000)
    with monkeypatch.context() as patch:
        seen = dict[str, tuple[int, ...]]()
        patch.setattr(masters, "compare_with_master", lambda _, name, weight, master: seen.update({name: master.shape}))
        check_masters(StateReader(checkpoint), sampled=True)
    assert {seen[f"blocks.{layer}.mlp.experts.up_weight"] for layer in (1, 2, 3)} == {(2, 16, 32)}
    monkeypatch.setattr(StateReader, "read_part", lambda self, kind, part, shape: torch.full(shape, 7.0))
    with pytest.raises(CheckpointError, match="does not round to its bfloat16 weight"):
        check_masters(StateReader(checkpoint), sampled=True)
