"""Directories whose tensors have several dtypes: each keeps its own; where it is wider, a run writes the masters."""

from fnmatch import fnmatch
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
from tests.made_once import MakeOnce
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.ours import Place, engine_config, session_of
from tests.parity.reference import make_model
from tests.ranks import run_grid

BF16 = Recipe(precision="bf16")
STEPS = 2
ADAPTED = ("k_proj", "v_proj")
CASES = {"llama": CONFIGS["llama"], "mixtral": FAMILY_CASES["mixtral-four-experts"]}
FROZEN = {
    "llama": ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight", "*.2.mlp.down_proj.weight"),
    "mixtral": ("*.layers.1.block_sparse_moe.experts.*.w2.weight", "*.layers.0.self_attn.*_proj.weight"),
}


def _save(directory: Path) -> None:
    for name, config in CASES.items():
        make_model(config).save_pretrained(directory / name)


@pytest.fixture(scope="module")
def mixed(once: MakeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case with tensors in fp32 and bf16 in turn."""
    place, directory = tmp_path_factory.mktemp("mixed"), once(_save)[0]
    for name in CASES:
        changed(directory / name, place / name, alternating(torch.float32, torch.bfloat16))
    return place


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


def _run(grid: Grid, directory: Path, place: Place, folder: Path, frozen: tuple[str, ...]) -> None:
    """Two steps, a save and an export; of a checkpoint, the export alone."""
    model = load_model(directory, freeze=frozen)
    engine = session_of(grid).build_engine(model, engine_config(place, BF16)).engine
    if not (directory / "training_state").is_dir():
        options = SaveOptions(folder, asynchronous=place.zero != 3, source=model.source)
        steps(engine, model.hf, grid, place, BF16, 0, STEPS)
        saver = Saver(engine, model.hf, options, Origin())
        saver.save(Progress(step=STEPS))
        saver.wait()
    else:
        load_state(engine, StateReader(directory))
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
    ("case", "place", "other"),
    [
        ("llama", Place(2, 2, 1, 1, True), Place(1, 1, 2, 2)),
        ("llama", Place(1, 1, 2, 3), Place()),
        ("mixtral", Place(1, 1, 2, 2, expert=2), Place(1, 2, 1, 1)),
        pytest.param("mixtral", Place(2, 1, 2, 3, expert=2), Place(2, 1, 1, 1), marks=pytest.mark.sweep),
        pytest.param("llama", Place(1, 1, 2, 2), Place(1, 2, 2, 1), marks=pytest.mark.sweep),
        pytest.param("llama", Place(4, 1, 1, 1), Place(1, 4, 1, 1), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_a_run_in_bf16_writes_what_its_source_has_in_fp32_from_the_masters(
    case: str, place: Place, other: Place, mixed: Path, tmp_path: Path
) -> None:
    """At any ZeRO stage; what is frozen keeps its bytes; a resumed run writes the same."""
    source = mixed / case
    given, frozen = load_file(source / "model.safetensors"), FROZEN[case]
    run_grid(_run, place.layout, source, place, tmp_path, frozen, expert=place.expert)
    checkpoint = tmp_path / name_of(STEPS)
    masters, found = masters_of(checkpoint), load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == given.keys() and masters.keys() < found.keys()
    for name, tensor in found.items():
        assert tensor.dtype == given[name].dtype, name
        expected = masters[name].to(tensor.dtype) if name in masters else given[name]
        assert torch.equal(tensor, expected), name
    narrow = [name for name in masters if not torch.equal(masters[name].bfloat16().float(), masters[name])]
    assert len(narrow) > len(masters) // 2, "rounding changes most masters"
    still = [name for name in given if any(fnmatch(name, pattern) for pattern in frozen)]
    assert {*still} == found.keys() - masters.keys() and len({given[name].dtype for name in still}) == 2
    assert hashes(checkpoint) == hashes(tmp_path / "hf")
    check_masters(StateReader(checkpoint), sampled=False)
    mds.export_hf(checkpoint, tmp_path / "files")
    assert hashes(tmp_path / "files") == hashes(tmp_path / "hf")
    mds.export_hf(checkpoint, tmp_path / "wide", "float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(tensor, masters.get(name, given[name]).float()) for name, tensor in wide.items())
    run_grid(_run, other.layout, checkpoint, other, tmp_path / "again", frozen)
    assert hashes(tmp_path / "again" / "hf") == hashes(tmp_path / "hf")


def test_a_dtype_that_is_asked_for_is_that_of_all(mixed: Path, tmp_path: Path) -> None:
    run_grid(_adapted, Place().layout, mixed / "llama", tmp_path, "bfloat16")
    assert {one.split()[0] for one in hashes(tmp_path / "merged").values()} == {"BF16"}


def test_merged_adapters_keep_the_dtype_of_each_tensor(mixed: Path, tmp_path: Path) -> None:
    """Merged by the run, and from files; keys and values are one parameter here, and of two dtypes."""
    source = mixed / "llama"
    run_grid(_adapted, Place(2, 1, 1, 1).layout, source, tmp_path, None)
    mds.export_hf(tmp_path / "adapters", tmp_path / "files", merge=True, base=source)
    given, found = load_file(source / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: one.dtype for name, one in given.items()}
    assert hashes(tmp_path / "files") == hashes(tmp_path / "merged")
    merged = {name for name, tensor in found.items() if not torch.equal(tensor, given[name])}
    assert merged == {name for name in given if name.split(".")[-2] in ADAPTED}
    assert {given[name].dtype for name in merged} == {torch.float32, torch.bfloat16}


def _adapted(grid: Grid, directory: Path, target: Path, dtype: str | None) -> None:
    model = load_model(directory, peft={"r": 2, "target_modules": [*ADAPTED]})
    place = Place(grid.tensor.size, 1, 1, 1)
    engine = session_of(grid).build_engine(model, engine_config(place, BF16)).engine
    steps(engine, model.hf, grid, place, BF16, 0, STEPS)
    for name in ("adapters", "merged"):
        section = ExportSection.model_validate({"path": str(target / name), "dtype": dtype, "merge": name == "merged"})
        export_live(engine, model, section, "bf16")
