"""Data sets on the hub: configurations, splits, columns, revisions, errors; and text that is read as a stream."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data import Causal, Dataset, open_dataset
from megatron_ds.data.readers.source import Source
from megatron_ds.errors import DataError
from tests.hub.local_hub import LocalHub, go_offline
from tests.training.tiny import write_tokenizer

CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.jsonl}, {split: test, path: en/test.jsonl}]
- config_name: de
  data_files: [{split: train, path: de/train.jsonl}]
---
"""


def rows(first: int, count: int, column: str = "text") -> bytes:
    lines = [{column: f"w{number % 58} w1 w2", "id": number} for number in range(first, first + count)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


FILES = {
    "README.md": CARD.encode(),
    "en/train.jsonl": rows(0, 30),
    "en/test.jsonl": rows(30, 5),
    "de/train.jsonl": rows(40, 7, "content"),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def opened(source: Source, tokenizer: Path) -> Dataset:
    cache = str(tokenizer.parent / "tokens")
    return open_dataset("text", Causal(), [source], 8, 61, str(tokenizer), cache)


def message(source: Source, tokenizer: Path) -> str:
    with pytest.raises(DataError) as refused:
        opened(source, tokenizer)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def ids(data: Dataset) -> list[Any]:
    return [np.asarray(data.sample(index)["input_ids"]).tolist() for index in range(len(data))]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_source_names(hub: LocalHub, tokenizer: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.publish(FILES, "org/set", "datasets")
    hub.publish({**FILES, "en/train.jsonl": rows(0, 12)}, "org/set", "datasets")

    def length(*fields: Any, **more: Any) -> int:
        return len(opened(Source(*fields, **more, streaming=streaming), tokenizer))

    assert length("org/set", "en") == 12 * 4 // 8 - (12 * 4 % 8 == 0)
    assert length("org/set", "en", "test") == 5 * 4 // 8
    assert length("org/set", "de", columns=(("text", "content"),)) == 7 * 4 // 8
    assert length(f"org/set@{first}", "en") == 30 * 4 // 8 - (30 * 4 % 8 == 0)
    unknown = message(Source("org/set", "fr", streaming=streaming), tokenizer)
    assert "fr" in unknown and "['en', 'de']" in unknown
    absent = message(Source("org/set", "de", "test", streaming=streaming), tokenizer)
    assert "'test'" in absent and "['train']" in absent
    assert "'text'" in message(Source("org/set", "de", streaming=streaming), tokenizer)
    assert "org/none" in message(Source("org/none", streaming=streaming), tokenizer)
    go_offline(monkeypatch)
    assert length("org/set", "en") > 0, "the cache has it"
    refused = message(Source("org/other", streaming=streaming), tokenizer)
    assert refused.startswith("data: org/other") and "fflineMode" in refused if not streaming else "OFFLINE" in refused
    assert "try `hf download org/other --repo-type dataset" in refused and "where there is a net" in refused


def test_a_stream_is_read_once_and_not_kept(hub: LocalHub, tokenizer: Path, tmp_path: Path) -> None:
    hub.publish(FILES, "org/set", "datasets")
    streamed = opened(Source("org/set", "en", streaming=True), tokenizer)
    blobs = [one.read_bytes() for one in hub.cache.parent.rglob("*") if one.is_file()]
    assert not any(b"w1 w2" in content for content in blobs), "no row is on the disk"
    (tmp_path / "plain.jsonl").write_bytes(FILES["en/train.jsonl"])
    assert ids(streamed) == ids(opened(Source(str(tmp_path / "plain.jsonl")), tokenizer))
    hub.forget_requests()
    assert ids(opened(Source("org/set", "en", streaming=True), tokenizer)) == ids(streamed)
    assert [one.path for one in hub.requests] == ["/api/datasets/org/set"], "the tokens are in the cache"
    hub.stop()
    assert ids(opened(Source("org/set", "en", streaming=True), tokenizer)) == ids(streamed)


def test_what_is_not_streamed(hub: LocalHub, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_bytes(FILES["en/train.jsonl"])
    local = message(Source(str(tmp_path / "plain.jsonl"), streaming=True), tokenizer)
    assert "streaming=true is for data sets on the hub, such as org/name; remove it" in local
    part = message(Source("org/set", "en", "train[:10%]", streaming=True), tokenizer)
    assert "split=train[:10%]: a stream is read from its start to its end; try the name of a split" in part
