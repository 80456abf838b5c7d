"""Tensors that pass through: byte for byte in every export and checkpoint, linked from save to save, never trained."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_ds as mds
from megatron_ds.checkpoint import passed_through
from megatron_ds.checkpoint.directory import checkpoints_in, name_of
from megatron_ds.checkpoint.inspect import CheckpointFacts, inspect
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.masters import check_masters
from megatron_ds.checkpoint.passed_through import PASSED_THROUGH, PassedThrough
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import StateReader, first_damage
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.config import ExportSection, RunConfig, build_run
from megatron_ds.errors import DataError, LaunchError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.weights import HFWeights
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from megatron_ds.runtime.export import export_live
from tests.checkpoint.runs import steps
from tests.hf.models import hashes
from tests.hf.seeing_models import IMAGE_ID, TOWER, save_seeing, tower
from tests.made_once import MakeOnce
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_config, session_of
from tests.parity.reference import make_model
from tests.parity.vision_language_cases import VISION_LANGUAGE_CASES
from tests.ranks import preload, run_alone, run_grid
from tests.training.tiny import run_mapping

BF16 = Recipe(precision="bf16")


@pytest.fixture(scope="module")
def made(once: MakeOnce) -> Path:
    return once(save_seeing)[0]


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "source"))


def _run(grid: Grid, directory: Path, place: Place, folder: Path, saves: int) -> None:
    """Two steps, some saves, an export; of a checkpoint, what it was resumed for."""
    model = load_model(directory)
    engine = session_of(grid).build_engine(model, engine_config(place, BF16)).engine
    options = SaveOptions(folder, model_path=str(directory), tokenizer_path=str(directory), source=model.source)
    saver = Saver(engine, model.hf, options, Origin())
    if (directory / "training_state").is_dir():
        load_state(engine, StateReader(directory))
    for number in range(saves):
        steps(engine, model.hf, grid, place, BF16, number, number + 1)
        saver.save(Progress(step=number + 1))
    saver.wait()
    assert not [name for name, _ in engine.local_parameters() if "visual" in name]
    export_live(engine, model, ExportSection(path=str(folder / "hf"), max_shard_size="40KB"), "bf16")


def loads_as_a_whole(directory: Path) -> None:
    """Check that transformers' class of text and images misses nothing there and finds nothing else."""
    from transformers import AutoModelForImageTextToText

    _, told = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not told["missing_keys"] and not told["mismatched_keys"], told
    assert {*told["unexpected_keys"]} <= {f"{TOWER}position_ids"}, told


def test_files_pass_through(made: Path, tmp_path: Path) -> None:
    rewrite(made, tmp_path / "clean", "float16", max_shard_size="40KB")
    mds.import_hf(made, tmp_path / "checkpoint")
    mds.export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert tower(tmp_path / "clean") == tower(made), "whatever the dtype of the text"
    assert hashes(tmp_path / "checkpoint") == hashes(tmp_path / "hf") == hashes(made)
    run_alone(loads_as_a_whole, tmp_path / "hf")


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (Place(2, 1, 1, 1, True), Place(1, 2, 1, 1)),
        pytest.param(Place(1, 1, 2, 3), Place(2, 1, 1, 1), marks=pytest.mark.sweep),
        pytest.param(Place(2, 2, 1, 1, True), Place(1, 1, 2, 2), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_training_saving_resuming_and_exporting_change_no_byte(
    place: Place, other: Place, source: Path, made: Path, tmp_path: Path
) -> None:
    run_grid(_run, place.layout, source, place, tmp_path / "run", 2)
    first, second = (tmp_path / "run" / name_of(step) for step in (1, 2))
    for directory in (first, second, tmp_path / "run" / "hf"):
        assert tower(directory) == tower(made), directory
    assert hashes(second) == hashes(tmp_path / "run" / "hf") != hashes(first), "the text is trained"
    assert os.path.samefile(first / PASSED_THROUGH, second / PASSED_THROUGH), "linked"
    assert first_damage(second) is None
    check_masters(StateReader(second), sampled=False)
    shutil.rmtree(source)
    shutil.rmtree(first)
    run_grid(_run, other.layout, second, other, tmp_path / "again", 0)
    run_grid(_run, other.layout, second, other, tmp_path / "further", 1)
    assert hashes(tmp_path / "again" / "hf") == hashes(second)
    third = tmp_path / "further" / name_of(1)
    assert tower(third) == tower(made) and os.path.samefile(second / PASSED_THROUGH, third / PASSED_THROUGH)
    mds.export_hf(second, tmp_path / "files")
    assert hashes(tmp_path / "files") == hashes(second)
    for directory in (second, tmp_path / "again" / "hf"):
        run_alone(loads_as_a_whole, directory)
        assert (directory / "preprocessor_config.json").read_bytes() == b'{"patch_size":  4}'


FIRST_CASES = {case.partition("-")[0]: case for case in reversed(VISION_LANGUAGE_CASES)}


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", sorted(FIRST_CASES))
def test_every_type(model_type: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    run_alone(_save_case, FIRST_CASES[model_type], source)
    passed = frozenset(HFWeights(source, read_model(source)).model.passed_through)
    given = {name: one for name, one in hashes(source).items() if name in passed}
    assert given
    place = Place(2, 1, 1, 1)
    run_grid(_run, place.layout, source, place, tmp_path / "run", 2)
    mds.export_hf(tmp_path / "run" / name_of(2), tmp_path / "files")
    for directory in (tmp_path / "run" / name_of(2), tmp_path / "run" / "hf", tmp_path / "files"):
        assert {name: one for name, one in hashes(directory).items() if name in passed} == given
        assert hashes(directory).keys() == hashes(source).keys()


def _save_case(case: str, directory: Path) -> None:
    make_model(VISION_LANGUAGE_CASES[case]).to(torch.bfloat16).save_pretrained(directory)


# ---- the file itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def file_of(source: Path) -> PassedThrough:
    return PassedThrough(HFWeights(source, read_model(source)))


def _put(file: PassedThrough, directory: Path) -> Path:
    directory.mkdir()
    file.now_in(directory, file.put(directory))
    return directory / PASSED_THROUGH


def _no_links(*_: Any) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_without_hard_links_it_is_copied(
    file_of: PassedThrough, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passed_through, "_WAYS", (_no_links, shutil.copyfile))
    first = _put(file_of, tmp_path / "first")
    shutil.rmtree(source)  # the one before has all of it
    second = _put(file_of, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes() and not os.path.samefile(first, second)


def test_a_damaged_file_is_not_linked_but_written_anew(file_of: PassedThrough, tmp_path: Path) -> None:
    first = _put(file_of, tmp_path / "first")
    intact = first.read_bytes()
    with first.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert _put(file_of, tmp_path / "second").read_bytes() == intact != first.read_bytes()
    first.unlink()
    assert _put(file_of, tmp_path / "third").read_bytes() == intact


def test_a_source_that_changed_is_refused(file_of: PassedThrough, source: Path, tmp_path: Path) -> None:
    _put(file_of, tmp_path / "first").unlink()
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: 8 + int.from_bytes(content[:8], "little")].ljust(len(content)))
    (tmp_path / "second").mkdir()
    with pytest.raises(OSError, match="pass through have changed in"):
        file_of.put(tmp_path / "second")


# ---- runs ------------------------------------------------------------------------------------------------------------


def tiny_run(corpus: Path, source: Path, output: Path, **sections: Any) -> RunConfig:
    """A run of four steps of a model of text and images, with a save after each second."""
    mapping = run_mapping(corpus, output)
    mapping["model"] = {"path": str(source), "tokenizer": str(corpus / "tokenizer")}
    mapping["train"].update(steps=4)
    mapping["data"].update(valid=[])
    mapping["checkpoint"] = {"every": 2, "asynchronous": True}
    mapping["deepspeed"]["bf16"] = {"enabled": True}
    return build_run({**mapping, **sections})


def test_a_run_that_is_killed_while_it_saves_leaves_the_former_checkpoint(
    corpus: Path, source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it goes on when its model's directory is gone, from what its own checkpoint has."""
    preload()
    put = PassedThrough.put

    def put_and_die(self: PassedThrough, directory: Path) -> Any:
        record = put(self, directory)
        if directory.name == f".{name_of(4)}.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PassedThrough, "put", put_and_die)
        with pytest.raises(LaunchError, match="rank 0 was killed by SIGKILL"):
            mds.train(tiny_run(corpus, source, output), 2)
    (left,) = checkpoints_in(output / "checkpoints")
    assert left.name == name_of(2) and first_damage(left) is None and tower(left) == tower(made)
    shutil.rmtree(source)
    mds.train(tiny_run(corpus, source, output, export={"path": str(tmp_path / "hf"), "check": True}), 2)
    last = output / "checkpoints" / name_of(4)
    assert tower(last) == tower(tmp_path / "hf") == tower(made) and hashes(last) == hashes(tmp_path / "hf")
    assert os.path.samefile(left / PASSED_THROUGH, last / PASSED_THROUGH)
    facts = inspect(last)
    assert isinstance(facts, CheckpointFacts) and facts.model is not None and not facts.problems
    passed = facts.model.passed_through
    assert passed is not None and passed.tensors == len(tower(made)) and passed.dtypes == {"F32": 27, "I64": 1}
    assert facts.model.dtypes == {"BF16": len(hashes(made)) - 28}
    with (last / PASSED_THROUGH).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert f"{PASSED_THROUGH} does not match its checksum" in str(first_damage(last))


def test_a_placeholder_in_the_data_is_refused_before_training(corpus: Path, source: Path, tmp_path: Path) -> None:
    lines = (corpus / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:5], json.dumps({"input_ids": [3, IMAGE_ID, 4]})]))
    data = run_mapping(tmp_path, tmp_path / "run", "tokenized")["data"]
    with pytest.raises(
        DataError, match=rf"/train.jsonl:6: input_ids: holds the id {IMAGE_ID}, which is image_token_id"
    ):
        mds.train(tiny_run(corpus, source, tmp_path / "run", data={**data, "valid": []}), 1)
    assert not (tmp_path / "run").exists()


def test_merged_adapters(source: Path, made: Path, tmp_path: Path) -> None:
    """By a run and from files: the tower is the base's."""
    run_grid(_adapted, Place(2, 1, 1, 1).layout, source, tmp_path)
    mds.export_hf(tmp_path / "adapters", tmp_path / "files", merge=True, base=source)
    assert hashes(tmp_path / "files") == hashes(tmp_path / "merged") and tower(tmp_path / "files") == tower(made)
    changed = {name for name, one in hashes(tmp_path / "merged").items() if one != hashes(made)[name]}
    assert changed == {f"model.language_model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}
    _enlarge(tmp_path / "adapters", 140)
    mds.export_hf(tmp_path / "adapters", tmp_path / "larger", merge=True, base=source)
    assert tower(tmp_path / "larger") == tower(made)
    assert json.loads((tmp_path / "larger" / "config.json").read_text())["text_config"]["vocab_size"] == 140
    run_alone(loads_as_a_whole, tmp_path / "larger")


def _adapted(grid: Grid, directory: Path, target: Path) -> None:
    model = load_model(directory, peft={"r": 2, "target_modules": ["q_proj"]})
    place = Place(2, 1, 1, 1)
    engine = session_of(grid).build_engine(model, engine_config(place, BF16)).engine
    steps(engine, model.hf, grid, place, BF16, 0, 2)
    for name in ("adapters", "merged"):
        export_live(engine, model, ExportSection(path=str(target / name), merge=name == "merged"), "bf16")


def _enlarge(adapters: Path, vocab_size: int) -> None:
    """Add the tables of a larger vocabulary, as peft does where it was resized."""
    tensors = load_file(adapters / "adapter_model.safetensors")
    for name in ("model.language_model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.randn(vocab_size, 32)
    save_file(tensors, adapters / "adapter_model.safetensors", metadata={"format": "pt"})
