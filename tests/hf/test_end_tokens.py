"""Ids that data teach as an end, in generation_config.json: the model's own first, each once, nothing else changed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ds.hf.end_tokens import add_end_ids, files_with_end_ids, known_end_ids, with_end_ids


@pytest.mark.parametrize(
    ("known", "learned", "expected"),
    [
        (0, [2], [0, 2]),
        ([0, 7], [2, 7], [0, 7, 2]),
        (None, [2], 2),
        (None, [2, 3], [2, 3]),
        (5, [2, 3, 2], [5, 2, 3]),
    ],
)
def test_ids_are_added(known: Any, learned: list[int], expected: Any) -> None:
    settings = {"do_sample": True, "temperature": 0.6, **({} if known is None else {"eos_token_id": known})}
    assert json.loads(with_end_ids(json.dumps(settings), learned)) == {**settings, "eos_token_id": expected}


@pytest.mark.parametrize(("known", "learned"), [(0, [0]), ([0, 2], [2]), (0, []), (None, [])])
def test_settings_that_know_them_stay_byte_for_byte(known: Any, learned: list[int]) -> None:
    text = json.dumps({"eos_token_id": known, "b": 1}, indent=7)
    assert with_end_ids(text, learned) == text


def test_settings_with_more_ids_are_not_those_of_the_config() -> None:
    """transformers would make them again from config.json, which does not know the new id."""
    made = json.dumps({"_from_model_config": True, "eos_token_id": 1})
    assert json.loads(with_end_ids(made, [2])) == {"eos_token_id": [1, 2]}
    assert with_end_ids(made, [1]) == made


def test_directories_and_files_without_settings_stay_without(tmp_path: Path) -> None:
    add_end_ids(tmp_path, [2])
    assert not list(tmp_path.iterdir())
    assert files_with_end_ids({"adapter_config.json": b"{}"}, [2]) == {"adapter_config.json": b"{}"}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    add_end_ids(tmp_path, [2])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    files = files_with_end_ids({"generation_config.json": b'{"eos_token_id": 1}', "config.json": b"{}"}, [2])
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 2]} and files["config.json"] == b"{}"


def test_the_settings_of_the_model_are_known(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(eos_token_id=3))
    assert known_end_ids(model, None) == known_end_ids(model, tmp_path) == [3]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert known_end_ids(model, tmp_path) == [4, 5]
    (tmp_path / "generation_config.json").write_text("{}")
    assert known_end_ids(model, tmp_path) == [], "generate does not read config.json if the file is there"
