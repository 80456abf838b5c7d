"""`inspect` on labelled data: rows with their labels, and the rows of each class, of a file and of a run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.cli.main import _run
from megatron_ds.config.yaml_text import format_yaml
from tests.training.tiny import MODEL

Told = Callable[..., str]
ROWS = [("call me ishmael", "sea"), ("some years ago", "land"), ("never mind how long", "sea")]
WORDS = [{"tokens": ["call", "me", "Ishmael"], "tags": ["O", "O", "PER"]}]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], wordpiece: str) -> Told:
    """The output of the command on a file, or on a run, with the exit status 0."""

    def run(path: object, *arguments: str) -> str:
        capsys.readouterr()
        tokenizer = () if str(path).endswith(".yaml") else ("--tokenizer", wordpiece)
        assert _run(["inspect", str(path), *tokenizer, *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_file(write_jsonl: Any, tmp_path: Path, wordpiece: str) -> Path:
    train = write_jsonl([{"text": text, "label": label} for text, label in ROWS], "train.jsonl")
    content = {
        "model": {
            "config": {**MODEL, "vocab_size": 700},
            "tokenizer": wordpiece,
            "head": {"labels": ["land", "sea", "sky"], "pad_token_id": 0},
        },
        "data": {"format": "labelled", "train": [train], "seq_length": 12, "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 1},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(format_yaml(content))
    return path


def test_a_file_says_its_classes(write_jsonl: Any, told: Told) -> None:
    said = told(write_jsonl([{"text": text, "label": label} for text, label in ROWS]), "--samples", "2")
    assert "labelled    3 rows, " in said
    assert "class       sea: 2 (66.7%)\nclass       land: 1 (33.3%)\n" in said
    shown = re.findall(r"^row (\d): \d+ tokens, label (\w+)\n  │ (.*)$", said, re.MULTILINE)
    assert shown == [("0", "sea", ROWS[0][0]), ("1", "land", ROWS[1][0])]
    several = write_jsonl([{"text": "call", "labels": ["a", "b"]}, {"text": "call", "labels": []}], "several.jsonl")
    facts = json.loads(told(several, "--json"))
    assert (facts["format"], facts["classes"]) == ("labelled", {"a": 1, "b": 1})
    assert [one["label"] for one in facts["shown"]] == ["a, b", "no class"]
    numbers = write_jsonl([{"text": "call", "label": number} for number in (0, 2, 2)], "numbers.jsonl")
    assert json.loads(told(numbers, "--json"))["classes"] == {"0": 1, "1": 0, "2": 2}
    scores = write_jsonl([{"text": "call", "label": 0.5}, {"text": "call", "label": 2}], "scores.jsonl")
    assert [one["label"] for one in json.loads(told(scores, "--json"))["shown"]] == ["0.5", "2"]
    filtered = write_jsonl([{"text": "call", "score": 0.5}], "filtered.jsonl")
    assert json.loads(told(filtered, "--json"))["format"] == "text", "such as a corpus with the score of a filter"


def test_words_are_marked_with_their_classes(write_jsonl: Any, told: Told) -> None:
    said = told(write_jsonl(WORDS))
    assert "class       O: 2 (66.7%)\nclass       PER: 1 (33.3%)\n" in said
    (line,) = re.findall(r"^  │ (.*)$", said, re.MULTILINE)
    assert line.count("⟦") == 3 and re.search(r"⟦\w+/PER⟧", line) and "⟦me/O⟧" in line


def test_a_run_shows_rows_with_labels_and_classes(run_file: Path, told: Told) -> None:
    said = told(run_file, "--samples", "3")
    assert "data        labelled: 3 rows of " in said and "; sea 2, land 1, sky 0" in said
    assert "loss        on 2.0 labels of a step's 2 samples\n" in said
    assert "class       sea: 2 (66.7%)\nclass       land: 1 (33.3%)\nclass       sky: 0 (0.0%)\n" in said
    assert "learned     2 epochs of 3 samples; 6 labels" in said
    shown = dict(re.findall(r"^sample \d: \d+ tokens, label (\w+), \d+ positions of padding\n  │ (.*)$", said, re.M))
    assert shown == {label: text for text, label in ROWS if text in shown.values()} and len(shown) == 2
    facts = json.loads(told(run_file, "--json"))
    assert facts["label_column"] == "label" and facts["classes"] == {"land": 1, "sea": 2, "sky": 0}
    assert facts["columns"] == ["input_ids", "attention_mask", "label"]
