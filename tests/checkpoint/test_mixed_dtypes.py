"""Directories whose tensors have several dtypes: each keeps its own; where it is wider, a run writes the masters."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.masters import check_masters
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.config import ExportSection
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from megatron_ds.runtime.export import export_live
from tests.checkpoint.runs import steps
from tests.hf.models import changed, hashes
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_config, session_of
from tests.ranks import run_grid

FROZEN = tuple(f"model.layers.{name}_proj.weight" for name in ("1.mlp.up", "1.mlp.gate", "2.mlp.down"))
BF16 = Recipe(precision="bf16", frozen=FROZEN)
STEPS = 2


def alternating(*dtypes: torch.dtype) -> Any:
    """A change of tensors to these dtypes in turn, so that keys and values, gates and ups differ."""
    return lambda tensors: {name: tensors[name].to(dtype) for name, dtype in zip(sorted(tensors), cycle(dtypes))}


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2-tied"])
def test_files_keep_the_dtype_of_each_tensor(case: str, saved: Path, tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
    source = changed(saved / case / "float32", tmp_path / "source", alternating(*kinds))
    rewrite(source, tmp_path / "clean")
    mds.import_hf(source, tmp_path / "checkpoint")
    mds.export_hf(tmp_path / "checkpoint", tmp_path / "hf", max_shard_size="20KB")
    assert hashes(tmp_path / "clean") == hashes(tmp_path / "checkpoint") == hashes(tmp_path / "hf") == hashes(source)
    rewrite(source, tmp_path / "half", "bfloat16")
    assert {open_directory(tmp_path / "half").dtype(name) for name in hashes(source)} == {"BF16"}


def _run(grid: Grid, directory: Path, place: Place, folder: Path, checkpoint: Path | None = None) -> None:
    """Two steps, a save and an export; or the export of a checkpoint, resumed."""
    model = load_model(directory if checkpoint is None else checkpoint, freeze=BF16.frozen)
    engine = session_of(grid).build_engine(model, engine_config(place, BF16)).engine
    if checkpoint is None:
        options = SaveOptions(folder, asynchronous=place.zero != 3, source=model.source)
        steps(engine, model.hf, grid, place, BF16, 0, STEPS)
        saver = Saver(engine, model.hf, options, Origin())
        saver.save(Progress(step=STEPS))
        saver.wait()
    else:
        load_state(engine, StateReader(checkpoint))
    export_live(engine, model, ExportSection(path=str(folder / "hf"), dtype=None), "bf16")


def masters_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The masters under Hugging Face's names; what is frozen has none."""
    model, reader = load_model(checkpoint).hf, StateReader(checkpoint)
    to_hf, found = ToHF(model), dict[str, torch.Tensor]()
    for name in reader.progress.trained:
        whole = reader.read_full("master", name, model.table[name].op.native_shape(model.axis_sizes))
        found |= {theirs: tensor.clone() for theirs, tensor in to_hf.add(name, whole)}
    return found


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (Place(2, 2, 1, 1, True), Place(1, 1, 2, 2)),
        (Place(1, 1, 2, 2), Place(1, 2, 2, 1)),
        (Place(1, 1, 2, 3), Place()),
    ],
    ids=str,
)
def test_a_run_in_bf16_writes_what_its_source_has_in_fp32_from_the_masters(
    place: Place, other: Place, references: Any, tmp_path: Path
) -> None:
    """At any ZeRO stage; what is frozen keeps its bytes; a resumed run writes the same."""
    directory, _ = references("llama", Recipe())
    source = changed(directory, tmp_path / "source", alternating(torch.float32, torch.bfloat16, torch.bfloat16))
    given = load_file(source / "model.safetensors")
    assert {given[name].dtype for name in FROZEN} == {torch.float32, torch.bfloat16}, "frozen ones of each"
    run_grid(_run, place.layout, source, place, tmp_path)
    checkpoint = tmp_path / name_of(STEPS)
    masters, found = masters_of(checkpoint), load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == given.keys() and masters.keys() < found.keys()
    for name, tensor in found.items():
        assert tensor.dtype == given[name].dtype, name
        expected = masters[name].to(tensor.dtype) if name in masters else given[name]
        assert torch.equal(tensor, expected), name
    narrow = [name for name in masters if not torch.equal(masters[name].bfloat16().float(), masters[name])]
    assert len(narrow) > len(masters) // 2, "rounding changes most masters"
    assert {*FROZEN} == found.keys() - masters.keys()
    assert hashes(checkpoint) == hashes(tmp_path / "hf")
    check_masters(StateReader(checkpoint), sampled=False)
    mds.export_hf(checkpoint, tmp_path / "files")
    assert hashes(tmp_path / "files") == hashes(tmp_path / "hf")
    mds.export_hf(checkpoint, tmp_path / "wide", "float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(tensor, masters.get(name, given[name]).float()) for name, tensor in wide.items())
    run_grid(_run, other.layout, source, other, tmp_path / "again", checkpoint)
    assert hashes(tmp_path / "again" / "hf") == hashes(tmp_path / "hf")


def test_a_dtype_that_is_asked_for_is_that_of_all(references: Any, tmp_path: Path) -> None:
    directory, _ = references("llama", Recipe())
    source = changed(directory, tmp_path / "source", alternating(torch.float32, torch.bfloat16))
    run_grid(_asked, Place().layout, source, replace(BF16, frozen=()), tmp_path / "hf")
    assert {one.split()[0] for one in hashes(tmp_path / "hf").values()} == {"BF16"}


def _asked(grid: Grid, directory: Path, recipe: Recipe, target: Path) -> None:
    model = load_model(directory)
    engine = session_of(grid).build_engine(model, engine_config(Place(), recipe)).engine
    export_live(engine, model, ExportSection(path=str(target), dtype="bfloat16"), "bf16")
