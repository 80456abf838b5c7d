"""Rows without a usable example: refused, or left out, counted and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data import Order
from megatron_ds.data.held_out import HeldOut
from megatron_ds.data.readers.source import Source
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError
from tests.data.readers.files import COMPRESSIONS, FORMS, json_lines
from tests.data.readers.rows import CHAT_ROWS, ID_ROWS, TEXT_ROWS, prepared


def bad_lines(rows: Any, column: str, *values: Any) -> list[Any]:
    """Return good rows with bad lines between them: no JSON, no object, no such field, and values that are unfit."""
    bad = [b'{"cut', b"[1]", {"id": 1}, *({column: value} for value in values)]
    return [line for pair in zip(rows, bad) for line in pair]


BAD = {
    "text": bad_lines(TEXT_ROWS, "text", 7, "\ud800"),
    "tokenized": bad_lines(ID_ROWS, "input_ids", [9999], []),
    "chat": bad_lines(CHAT_ROWS, "messages", [{"role": "user", "content": "?"}], [{"role": "assistant", "content": 1}]),
}


LENGTHS = {"text": 8, "tokenized": 8, "chat": 128}


@pytest.mark.parametrize("format", sorted(BAD))
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_rows_are_left_out_and_counted(
    format: str, ending: str, write: Any, write_jsonl: Any, open_: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    raw = Path(write_jsonl(BAD[format], "bad.jsonl")).read_bytes()
    path = write(f"bad.jsonl{ending}", COMPRESSIONS[".gz"](raw) if ending else raw)
    good = open_(format, write("good.jsonl", json_lines(BAD[format][::2])), seq_length=LENGTHS[format])
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level("INFO", logger="megatron_ds"):
            data = open_(format, Source(path, skip_bad=True), seq_length=LENGTHS[format])
        assert len(data) == len(good) > 2
        for index in range(len(good)):
            assert data.sample(index)["input_ids"].tolist() == good.sample(index)["input_ids"].tolist()
            assert data.sample(index)["targets"].tolist() == good.sample(index)["targets"].tolist()
        assert data.bad_rows.count == 5 and "5 bad rows left out" in data.describe()
        places = [one.removeprefix(f"{path}:").partition(": ")[0] for one in data.bad_rows.first]
        assert places == ["2", "4", "6", "8", "10"] and ": not JSON (" in data.bad_rows.first[0]
        said = [record.getMessage() for record in caplog.records if "bad row" in record.getMessage()]
        assert said == ["data.bad_rows=skip: 5 bad rows left out"]
        assert f"  {data.bad_rows.first[4]}" in [record.getMessage() for record in caplog.records]
    with pytest.raises(DataError, match=r"bad\.jsonl(\.gz)?:2: not JSON"):
        open_(format, path, seq_length=LENGTHS[format])  # a cache that was made without them is no way around
    source = Source(path, skip_bad=True)
    parts = [open_(format, source, seq_length=LENGTHS[format], held_out=HeldOut(0.4, valid)) for valid in (False, True)]
    assert [part.bad_rows.count for part in parts] == [5, 0], "each row is counted once"
    blend = open_(format, source, source, seq_length=LENGTHS[format], weights=[1, 1], order=Order(4, 0, True))
    assert blend.bad_rows.count == 10 and len(blend.bad_rows.first) == 10


@pytest.mark.parametrize("format", sorted(BAD))
def test_a_source_of_bad_rows_alone_is_refused(format: str, write_jsonl: Any, open_: Any) -> None:
    path = write_jsonl(BAD[format][1::2])
    with pytest.raises(DataError) as caught:
        open_(format, Source(path, skip_bad=True))
    assert str(caught.value).startswith(f"data: {path}: all 5 rows are bad, the first at {path}:1: not JSON (")


@pytest.mark.parametrize(
    ("name", "content", "place", "says"),
    [
        ("a.json", b'[\n{"text": "a"},\n7,\n{"text": "b"}]', "a.json:3 (row 1)", "holds a JSON int"),
        ("a.csv", b"id,text\n1,a\n2\n3,b\n", "a.csv:3", "holds 1 fields, but the header has 2"),
        ("a.csv", b"id,text\n1,a\n2,b\xff\n3,b\n", "a.csv:3", "not UTF-8"),
        ("a.csv", b'id,text\n1,"a"\n\n"2\n3",b,c\n3,b\n', "a.csv:4", "holds 3 fields, but the header has 2"),
        ("a.parquet", FORMS["a.parquet"]([{"text": "a"}, {"text": None}, {"text": "b"}]), "a.parquet: row 1", "None"),
        ("a.jsonl", b'["a"]\n{"text": "a"}\n{"text": "b"}\n', "a.jsonl:1", "holds a JSON list; each line must"),
        ("a.jsonl", b'{"te\n{"text": "a"}\n{"text": "b"}\n', "a.jsonl:1", "not JSON"),
        ("a.jsonl", b'{"text": "a", \n{"text": "a"}\n{"text": "b"}\n', "a.jsonl:1", "not JSON"),
        ("d/b.txt", b"\xff", "d/b.txt:1", "not UTF-8"),
    ],
)
def test_bad_rows_of_other_files(
    name: str, content: bytes, place: str, says: str, write: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    path = write(name, content)
    if name == "d/b.txt":
        write("d/a.txt", b"a")
        write("d/c.txt", b"b")
        path = str(tmp_path / "d")
    source = Source(path, skip_bad=True)
    bad = source.bad_rows()
    assert list(TextSource(source).documents(bad)) == ["a", "b"]
    (first,) = bad.first
    assert first.startswith(f"{tmp_path}/{place}: ") and says in first
    assert prepared(tokenizer_path, tmp_path, path, skip_bad=True) == ["a", "b"]
    manifest = json.loads((tmp_path / "out/corpus.json").read_text())
    assert manifest["bad_lines"]["count"] == 1 and manifest["bad_lines"]["first"][0].startswith(f"{tmp_path}/{place}: ")
    with pytest.raises(DataError, match="1 of 3 documents cannot be used, the first at"):
        prepared(tokenizer_path, tmp_path, path)
