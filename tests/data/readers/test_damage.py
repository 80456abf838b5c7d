"""Files that are damaged or cut off are errors of the file, also where bad rows are left out."""

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data.readers.source import Source
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError
from tests.data.readers.files import COMPRESSIONS, FORMS, json_lines
from tests.data.readers.rows import TEXT_ROWS, prepared

BIG = json_lines([{"text": os.urandom(2000).hex()} for _ in range(100)])


@pytest.mark.parametrize("ending", sorted(COMPRESSIONS))
def test_a_file_that_is_cut_off_is_no_bad_row(
    ending: str, write: Any, open_: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    """Also where the end of the part that is there is that of a line, or the file is one document."""
    packed = COMPRESSIONS[ending](BIG)
    for name, raw in ((f"a.jsonl{ending}", packed[:-20]), (f"b.jsonl{ending}", packed[: len(packed) // 2])):
        source = Source(write(name, raw), skip_bad=True)
        for act in (
            lambda source=source: list(TextSource(source).documents(source.bad_rows())),
            lambda source=source: open_("tokenized", source),
            lambda source=source: prepared(tokenizer_path, tmp_path, source, skip_bad=True),
        ):
            with pytest.raises(DataError, match=r"is not a readable \w+ file \(.*\); it is damaged or cut off"):
                act()
    source = Source(write(f"a.txt{ending}", packed[:-20]), skip_bad=True)
    with pytest.raises(DataError, match=r"a\.txt\.\w+: is not a readable \w+ file"):
        list(TextSource(source).documents(source.bad_rows()))
    with pytest.raises(DataError, match=r"the \w+ file is empty; try to copy or make it again"):
        TextSource(write(f"empty.jsonl{ending}", b""))


def test_streams_are_no_sources(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: is a stream or device, .*; try a file"):
        TextSource(str(tmp_path / "pipe.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", FORMS["a.parquet"](TEXT_ROWS)[:-9], "is not a readable parquet file"),
        ("a.arrow", FORMS["file.arrow"](TEXT_ROWS)[:-9], "is not a readable arrow file"),
        ("a.arrow", FORMS["stream.arrow"](TEXT_ROWS)[:-300], "is not a readable arrow file"),
        ("a.json", FORMS["pretty.json"](TEXT_ROWS)[:-9], "a.json:30: not JSON (the document is cut off)"),
        ("a.json", FORMS["array.json"](TEXT_ROWS)[:-1], "a.json:1: not JSON (the document is cut off)"),
        ("a.json", FORMS["array.json"](TEXT_ROWS) * 2, "a.json:1: not JSON (there is more after the end of the array)"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json:1: not JSON (expected ',', found '{')"),
        ("a.json", b'{"data": [{"text": "a"}], "test": [{"text": "b"}]}', "several lists of rows, data, test"),
        ("a.json", b'[{"text": "a"}, {"text": tru}]', "a.json:1: not JSON (Expecting value)"),
        ("a.json", b'[{"text": "a"}, {"text": "b', "a.json:1: not JSON (the document is cut off)"),
        ("a.csv", b'text\n"a\nb\n', "a.csv:2: not CSV (unexpected end of data)"),
        ("a.csv", b"text,text\na,b\n", "a.csv:1: two columns have the same name"),
        ("a.jsonl", "text".encode("utf-16"), "a.jsonl: the text is UTF-16 or UTF-32, not UTF-8; try iconv"),
        ("a.txt", "text".encode("utf-16-le"), "a.txt: the text is UTF-16 or UTF-32, not UTF-8; try iconv"),
        ("a.zip", b"PK\x03\x04", "not in '.zip'; unpack the archive"),
    ],
)
def test_damage_of_a_file(
    name: str, content: bytes, says: str, write: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    source = Source(write(name, content), skip_bad=True)
    for act in (
        lambda: list(TextSource(source).documents(source.bad_rows())),
        lambda: prepared(tokenizer_path, tmp_path, source, skip_bad=True),
    ):
        with pytest.raises(DataError) as caught:
            act()
        assert says in str(caught.value) and "\n" not in str(caught.value)
