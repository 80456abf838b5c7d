"""Facts of a rank differ where its files, packages or settings do, and only there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig, build_run
from megatron_ds.digests import sampled_xxh3
from megatron_ds.runtime import file_facts, rank_facts
from megatron_ds.runtime.file_facts import MISSING, data_facts, model_facts
from megatron_ds.runtime.rank_facts import FIXES, plugin_facts, run_facts, run_file_facts
from tests.training.tiny import MODEL, run_mapping


def run_of(folder: Path, **data: Any) -> RunConfig:
    mapping = run_mapping(folder, folder / "out")
    mapping["data"].update(data)
    return build_run(mapping)


def model_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "model.safetensors").write_bytes(os.urandom(2**20))
    return folder


def test_every_key_of_a_run_file_is_compared_but_the_cache(tmp_path: Path) -> None:
    facts = run_file_facts(run_of(tmp_path))
    assert (
        facts["optimizer.lr"] == "0.003" and facts["train.seed"] == "1234" and facts["model.config.vocab_size"] == "61"
    )
    assert facts["deepspeed.zero_optimization.stage"] == "1" and "train.txt" in facts["data.train"]
    assert run_file_facts(run_of(tmp_path, cache_dir="/elsewhere")) == facts


def test_a_deepspeed_json_is_compared_by_its_content(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}')
    inline, *named = (
        run_file_facts(build_run({**run_mapping(tmp_path, tmp_path / "out"), "deepspeed": given}))
        for given in ({"zero_optimization": {"stage": 1}}, str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    )
    assert named == [inline, inline]


def _flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({**MODEL, "rms_norm_eps": 1e-3})),
            "rms_norm_eps",
        ),
        (lambda folder: _flip(folder / "model.safetensors", 9), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 2**20 + b"1"), "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    ],
)
def test_a_change_of_a_model_directory_is_named(change: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model")
    before = model_facts("model.path", str(folder))
    for other in ("README.md", "slurm-7.out", "log.0"):
        (folder / other).write_text("of this machine")
    assert model_facts("model.path", str(folder)) == before
    change(folder)
    after = model_facts("model.path", str(folder))
    assert name in next(one for one in {**before, **after} if before.get(one) != after.get(one))


def test_a_model_that_is_missing_and_one_on_the_hub(tmp_path: Path) -> None:
    assert model_facts("model.path", str(tmp_path / "none")) == {f"model.path={tmp_path}/none": MISSING}
    assert model_facts("model.path", "org/name") == model_facts("model.path", "s3://bucket/name") == {}


def test_data_of_every_form_are_compared(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.idx", "c.bin", "d/e/f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 300_000)
    given = {path: data_facts("data.train", str(tmp_path / path)) for path in ("a.jsonl", "*.jsonl", "c", "d")}
    assert [next(iter(facts.values())).partition(" ")[0] for facts in given.values()] == ["300,000", "2", "2", "1"]
    for name in ("a.jsonl", "c.bin", "d/e/f.jsonl"):
        _flip(tmp_path / name, 299_999)
    changed = {path: data_facts("data.train", str(tmp_path / path)) for path in given}
    assert all(changed[path] != facts for path, facts in given.items())
    (tmp_path / "a.jsonl").unlink()
    assert data_facts("data.train", str(tmp_path / "a.jsonl")) == {f"data.train ({tmp_path}/a.jsonl)": MISSING}
    assert data_facts("data.train", "org/name") == {}


def test_of_very_many_files_the_names_are_compared_and_pipes_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may need milliseconds for each size, and a start has a time limit."""
    monkeypatch.setattr(file_facts, "MOST_SIZED", 2)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("xy")
    os.mkfifo(tmp_path / "a_pipe")
    (before,) = data_facts("data.train", str(tmp_path)).values()
    assert before.startswith("4 files, the first 2 of 2 bytes (")
    (tmp_path / "c").rename(tmp_path / "d")
    assert data_facts("data.train", str(tmp_path)) != {f"data.train ({tmp_path})": before}


def test_samples_of_a_file_see_its_length_and_ends(tmp_path: Path) -> None:
    file, found = tmp_path / "file", set()
    for content in (b"", b"a", b"a" * 2**20, b"a" * (2**20 + 1), b"b" + b"a" * (2**20 - 1), b"a" * (2**20 - 1) + b"b"):
        file.write_bytes(content)
        found.add(sampled_xxh3(file))
    assert len(found) == 6


def test_code_of_plugins_and_variables_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "agreed_plugin.py").write_text("x = 1\n")
    __import__("agreed_plugin")
    before = plugin_facts(["agreed_plugin"])["imports: agreed_plugin"]
    (tmp_path / "agreed_plugin.py").write_text("x = 2\n")
    rank_facts._code_of.cache_clear()
    assert plugin_facts(["agreed_plugin"])["imports: agreed_plugin"] != before
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    facts = run_facts(run_of(tmp_path), None)
    assert facts["environment"]["NCCL_ALGO"] == "Tree" and facts["versions"]["torch"]
    assert list(facts) == [kind for kind in FIXES if kind in facts], "causes come before what follows from them"
