"""Masters and moments are those of the weights next to them: whatever DeepSpeed does with its flat vectors."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.checkpoint import saver
from megatron_ds.checkpoint.convert import export_hf
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.inspect import inspect
from megatron_ds.checkpoint.masters import check_masters, rounds_to
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.engine import optimizer_shards as optimizer_shards_module
from megatron_ds.engine.optimizer_shards import optimizer_shards
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.weights import HFWeights
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.checkpoint.runs import CUT, KINDS, apart, resumed_at, saved_at
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_config, engine_on, session_of
from tests.ranks import run_grid

RECIPE = Recipe(steps=3)
BF16 = replace(RECIPE, precision="bf16")
ROUND_ROBIN = {"round_robin_gradients": True}


def _zero(stage: int, tp: int = 1, pp: int = 1, **keys: Any) -> Place:
    return Place(tp, pp, 2, stage, extra=(("zero_optimization", {"stage": stage, **keys}),))


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader, weights = StateReader(checkpoint), HFWeights(checkpoint, read_model(checkpoint))
    shapes = {name: tuple(whole.shape) for name, whole in weights.each()}
    return {f"{kind} {name}": reader.read_full(kind, name, shape) for name, shape in shapes.items() for kind in KINDS}


@pytest.mark.parametrize(
    ("place", "same", "recipe"),
    [
        (_zero(2, **ROUND_ROBIN), _zero(2), BF16),
        (_zero(1, **ROUND_ROBIN, parameter_alignment=True), _zero(1), RECIPE),
        (_zero(2, tp=2, **ROUND_ROBIN, overlap_comm=True, reduce_bucket_size=1000), _zero(2, tp=2), RECIPE),
        (_zero(2, **ROUND_ROBIN, offload_optimizer={"device": "cpu"}), _zero(2), BF16),
        pytest.param(_zero(1, pp=2, **ROUND_ROBIN), _zero(1, pp=2), RECIPE, marks=pytest.mark.sweep),
        pytest.param(_zero(3, zero_hpz_partition_size=2, sub_group_size=1000), _zero(3), BF16, marks=pytest.mark.sweep),
    ],
    ids=["z2", "z1-aligned", "tp2-z2-overlap", "z2-offload", "pp2-z1", "z3-subgroups"],
)
def test_no_order_of_deepspeeds_vectors_moves_a_master(
    place: Place, same: Place, recipe: Recipe, references: Any, tmp_path: Path
) -> None:
    """The same masters and moments as without the keys, up to the order in which a norm is summed."""
    directory, _ = references("qwen2-tied", Recipe())
    curve = saved_at(directory, place, recipe, tmp_path / "with")
    saved_at(directory, same, recipe, tmp_path / "without")
    checkpoint = tmp_path / "with" / name_of(CUT)
    check_masters(StateReader(checkpoint), sampled=False)
    expected = _state(tmp_path / "without" / name_of(CUT))
    for name, found in _state(checkpoint).items():
        assert torch.allclose(found, expected[name], rtol=1e-5, atol=1e-7), name
    assert resumed_at(checkpoint, place, recipe) == curve[CUT:]
    loss, norm = apart(resumed_at(checkpoint, Place(2, 1, 1, 1), recipe), curve[CUT:])
    bounds = (2e-5, 1e-4) if recipe is RECIPE else (1e-3, 2e-2)
    assert loss < bounds[0] and norm < bounds[1], (loss, norm)


def test_rounding_is_exact_and_nan_is_nan() -> None:
    master = torch.tensor([1.0 + 2**-9, 1.0 + 3 * 2**-9, float("nan"), float("inf"), -0.0, 1e-41])
    assert rounds_to(master, master.bfloat16()) and rounds_to(master, master) and rounds_to(master, master.half())
    assert not rounds_to(master, torch.nextafter(master, torch.tensor(2.0)))
    assert not rounds_to(torch.tensor([1.0 + 2**-8]), torch.tensor([1.0 + 2**-6]).bfloat16())
    assert not rounds_to(torch.tensor([1.0]), torch.tensor([float("nan")]))


def _save_after(grid: Grid, directory: Path, place: Place, recipe: Recipe, folder: Path, name: str, at: int) -> str:
    """The message of a save after one element of a master changed on the last rank that has it."""
    engine, model = engine_on(grid, directory, place, recipe)
    writer = Saver(engine, model, SaveOptions(folder, asynchronous=False), Origin())
    for shard in optimizer_shards(engine):
        if shard.name == name and grid.rank == grid.layout.world_size - 1:
            shard.master[at] += 0.25
    with pytest.raises(CheckpointError) as refused:
        writer.save(Progress(step=1))
    return str(refused.value)


@pytest.mark.parametrize(
    ("place", "recipe", "at"),
    [(Place(1, 1, 2, 3), BF16, -1), (Place(2, 1, 1, 1), RECIPE, 0), (Place(1, 2, 1, 1), BF16, 0)],
    ids=str,
)
def test_a_master_of_something_else_is_not_saved(
    place: Place, recipe: Recipe, at: int, references: Any, tmp_path: Path
) -> None:
    """Every rank raises, and nothing is written."""
    directory, _ = references("qwen2-tied", Recipe())
    name = "blocks.3.mlp.down.weight"
    for message in run_grid(_save_after, place.layout, directory, place, recipe, tmp_path, name, at):
        assert (
            f"step_00000001 is not saved: on rank 1 the fp32 master of {name} does not round to its weight" in message
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def permuted(references: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose masters are other parameters', as a version without this check wrote it."""
    directory, _ = references("qwen2-tied", Recipe())
    monkeypatch.setattr(optimizer_shards_module, "_positions_in_flat_vectors", lambda optimizer: {})
    monkeypatch.setattr(saver, "differing_master", lambda engine: None)
    saved_at(directory, _zero(2, **ROUND_ROBIN), BF16, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / name_of(CUT)


def test_files_with_other_masters_are_found_and_their_weights_can_be_used(permuted: Path, tmp_path: Path) -> None:
    for fast in (False, True):
        (problem,) = inspect(permuted, fast=fast).problems  # type: ignore[union-attr]
        assert "does not round to its bfloat16 weight" in problem and f"model.path={permuted}" in problem
    with pytest.raises(CheckpointError, match=r"the fp32 master of \S+ does not round to its bfloat16 weight"):
        export_hf(permuted, tmp_path / "wide", "float32")
    export_hf(permuted, tmp_path / "same")
    ours = load_file(permuted / "model.safetensors")
    assert all(
        torch.equal(ours[name], theirs) for name, theirs in load_file(tmp_path / "same/model.safetensors").items()
    )


def _load(grid: Grid, checkpoint: Path) -> str:
    made = session_of(grid).build_engine(load_model(checkpoint), engine_config(Place(1, 1, 1, 1), BF16))
    with pytest.raises(CheckpointError) as refused:
        made.load(checkpoint)
    return str(refused.value)


def test_files_with_other_masters_are_not_resumed_from(permuted: Path, tmp_path: Path) -> None:
    says = r"the fp32 master of \S+ does not round to its bfloat16 weight"
    assert re.search(says, run_grid(_load, Place(1, 1, 1, 1).layout, permuted)[0])
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"input_ids": [row % 131] * 33}) for row in range(8)))
    run = {
        "model": {"path": str(permuted)},
        "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        "data": {"format": "tokenized", "train": str(data), "seq_length": 33},
        "train": {"steps": 5},
        "checkpoint": {"resume": str(permuted), "every": 5},
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(CheckpointError, match=says):
        mds.train(mds.build_run(run))
    assert not (tmp_path / "run").exists()
