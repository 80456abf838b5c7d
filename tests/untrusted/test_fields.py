"""One wrong value in a file: a name that leads elsewhere, another type, a number out of bounds; named in one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.directory import MANIFEST, PROGRESS, read_manifest, resolve_checkpoint
from megatron_ds.checkpoint.reader import first_damage
from megatron_ds.errors import CheckpointError, ConversionError, LaunchError, MegatronDSError
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.monitor.report.page import write_report
from megatron_ds.remote.store import Store
from tests.untrusted.mutations import pipe
from tests.untrusted.readers import _STEP, READERS, _checkpoint, _indexed, _metrics

INDEX = "model.safetensors.index.json"


def set_value(file: Path, place: list[Any], value: Any) -> None:
    content = json.loads(file.read_text())
    container = content
    for key in place[:-1]:
        container = container[key]
    container[place[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "file", "place", "value", "rule"),
    [
        ("index", INDEX, ["weight_map", "a"], "../a.safetensors", "points outside the directory"),
        ("index", INDEX, ["weight_map", "a"], "/dev/zero", "points outside the directory"),
        ("index", INDEX, ["weight_map", "a"], 5, "has no weight_map from tensors to files"),
        ("sentence modules", "modules.json", [1, "path"], "../1_Pooling", "points outside the directory"),
        ("sentence modules", "modules.json", [1, "path"], "/etc", "points outside the directory"),
        ("adapters", "adapter_config.json", ["target_modules"], ["q_proj", 1], "target_modules[1]=1 is not a name"),
        ("adapters", "adapter_config.json", ["modules_to_save"], [[]], "modules_to_save[0]=[] is not a name"),
        (
            "adapters",
            "adapter_config.json",
            ["layers_to_transform"],
            [0, "1"],
            "layers_to_transform[1]=1 is not an int",
        ),
        ("adapters", "adapter_config.json", ["rank_pattern"], 5, "rank_pattern=5 is not a mapping"),
        ("config.json of t5", "config.json", ["decoder_start_token_id"], "0", "decoder_start_token_id='0'"),
        ("config.json of llama", "config.json", ["rope_scaling", "rope_type"], {"a": 1}, "rope_type"),
        ("config.json of llama", "config.json", ["vocab_size"], 10**30, "is larger than an integer may be"),
        ("generation settings", "generation_config.json", ["eos_token_id"], ["a"], 'eos_token_id=["a"] must be an id'),
        ("tokenizer", "tokenizer/tokenizer_config.json", ["model_max_length"], "5", "model_max_length"),
        ("checkpoint", f"{_STEP}/{PROGRESS}", ["progress", "step"], "five", "progress.step=five"),
        ("checkpoint", f"{_STEP}/{PROGRESS}", ["progress", "step"], 4.0, "progress.step=4.0"),
        ("checkpoint", f"{_STEP}/{PROGRESS}", ["progress", "step"], -1, "progress.step=-1"),
        ("checkpoint", f"{_STEP}/{PROGRESS}", ["progress", "trained"], "ab", "progress.trained=ab"),
        ("checkpoint", f"{_STEP}/{PROGRESS}", ["progress", "other"], 1, "progress.other=1"),
        ("checkpoint", f"{_STEP}/{PROGRESS}", ["format_version"], "1", "format_version=1"),
        ("checkpoint", f"{_STEP}/{MANIFEST}", ["files", PROGRESS, "bytes"], float("inf"), "bytes"),
        ("checkpoint", f"{_STEP}/{MANIFEST}", ["files", PROGRESS, "bytes"], 1, "is not the checksum of its files"),
        ("splits", "saved/dataset_dict.json", ["splits"], [1], "dataset_dict.json there is damaged"),
    ],
)
def test_wrong_values_are_named(name: str, file: str, place: list[Any], value: Any, rule: str, tmp_path: Path) -> None:
    READERS[name].make(tmp_path)
    set_value(tmp_path / file, place, value)
    with pytest.raises(MegatronDSError) as refused:
        READERS[name].read(tmp_path)
    assert rule in str(refused.value), str(refused.value)


def test_a_link_out_of_a_directory_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    _indexed(directory)
    shutil.move(directory / "a.safetensors", tmp_path / "a.safetensors")
    (directory / "a.safetensors").symlink_to("../a.safetensors")
    with pytest.raises(ConversionError, match=r"a points outside the directory: .* is a link to "):
        open_directory(directory)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_manifest_that_names_other_files(name: str, tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    manifest = tmp_path / _STEP / MANIFEST
    content = json.loads(manifest.read_text())
    files = {**content["files"], name: {"bytes": 1, "xxh3_128": "x"}}
    manifest.write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=r"is damaged .*points outside the directory"):
        read_manifest(tmp_path / _STEP)


def test_manifest_that_lost_a_file(tmp_path: Path) -> None:
    """Without the checksum of the manifest itself the file would not be missed; earlier manifests have none."""
    _checkpoint(tmp_path)
    manifest = tmp_path / _STEP / MANIFEST
    content = json.loads(manifest.read_text())
    earlier = {"files": content["files"]}
    del content["files"]["config.json"]
    manifest.write_text(json.dumps(content))
    assert "files_xxh3_128 is not the checksum" in str(first_damage(tmp_path / _STEP))
    manifest.write_text(json.dumps(earlier))
    assert first_damage(tmp_path / _STEP) is None


@pytest.mark.parametrize("name", ["../step_00000009", "", "\0", "x" * 5000, "step_00000009"])
def test_latest_that_names_no_checkpoint(name: str, tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "latest").write_text(name)
    assert resolve_checkpoint(tmp_path) == tmp_path / _STEP


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    for name, reader in READERS.items():
        for number, file in enumerate(() if pipe in reader.without else reader.files):
            folder = tmp_path / f"{name} {number}".replace(" ", "_").replace(".", "_")
            folder.mkdir()
            reader.make(folder)
            (target,) = folder.glob(file)
            target.unlink()
            os.mkfifo(target)
            try:
                reader.read(folder)
            except MegatronDSError as refused:
                assert "\n" not in str(refused)


def test_damaged_lines_of_saves_are_counted_in_the_report(tmp_path: Path) -> None:
    _metrics(tmp_path)
    with (tmp_path / "checkpoints" / "saves.jsonl").open("ab") as file:
        file.write(b'\xff\n{"bytes": "1"}\n{"bytes')
    assert (
        "2 saved" in (page := write_report(tmp_path).read_text()) and "2 more lines of saves.jsonl are damaged" in page
    )


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\nb"])
def test_names_of_a_store_that_lead_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "_ask", lambda self, action: [{"name": name, "size": 1, "version": ""}])
    with pytest.raises(MegatronDSError, match="leads out of a directory"):
        Store("s3://bucket/x", "model.path=s3://bucket/x").list()


def test_messages_are_one_line_of_limited_length() -> None:
    text = str(ConversionError("a\nb\x1b[2J\u202e" + "x" * 10**6 + "end"))
    assert text.isprintable() and len(text) < 2000 and text.endswith("end")
    assert str(LaunchError("a\nb")) == "a\nb"


def test_marks_of_exports_are_never_followed(tmp_path: Path) -> None:
    READERS["export mark"].make(tmp_path)
    set_value(tmp_path / "export" / MARK, ["files", "config.json", "bytes"], "2")
    assert READERS["export mark"].read(tmp_path) == f"holds a damaged {MARK}"
