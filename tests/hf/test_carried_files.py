"""Files of a model that exports and checkpoints carry unchanged: of processors and of sentence-transformers."""

import json
import shutil
from pathlib import Path

import pytest

import megatron_ds as mds
from megatron_ds.checkpoint.directory import read_manifest
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.export import small_files
from megatron_ds.hf.export_target import ExportTarget

CARRIED = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
)
OTHERS = ("README.md", "onnx/model.onnx", "runs.json")


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A model with all of these files, each with a content that no JSON library would write again."""
    directory = Path(shutil.copytree(saved / "llama" / "float32", tmp_path / "source"))
    for number, name in enumerate((*CARRIED, *OTHERS)):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b'{"b":  1,\r\n "a" : %d}' % number)
    return directory


def files_of(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_they_are_carried_by_exports_and_checkpoints_byte_for_byte(source: Path, tmp_path: Path) -> None:
    rewrite(source, tmp_path / "clean")
    mds.import_hf(source, tmp_path / "checkpoint")
    mds.export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    for made in ("clean", "checkpoint", "hf"):
        assert not files_of(tmp_path / made) & {*OTHERS}
        for name in CARRIED:
            assert (tmp_path / made / name).read_bytes() == (source / name).read_bytes(), (made, name)
    assert {*CARRIED} <= read_manifest(tmp_path / "checkpoint").keys(), "they have checksums"
    model = read_model(source)
    assert {*CARRIED} <= small_files(model, "float32", source, source).keys(), "those of a run's checkpoints"
    assert not {*CARRIED} & small_files(model, "float32", None, None).keys()


def test_folders_are_of_sentence_transformers_alone(source: Path, tmp_path: Path) -> None:
    (source / "modules.json").unlink()
    rewrite(source, tmp_path / "clean")
    assert not [name for name in files_of(tmp_path / "clean") if "/" in name]
    assert (tmp_path / "clean" / "preprocessor_config.json").is_file()


def test_a_directory_with_them_is_known_to_be_a_model(source: Path) -> None:
    for name in OTHERS:
        (source / name).unlink()
    (source / "onnx").rmdir()
    problem = ExportTarget(source)._problem(thorough=False)
    assert problem is not None and "no file of a model" not in problem, problem
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
