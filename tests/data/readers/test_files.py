"""Every form of file gives the same rows to train, prepare and inspect."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data.inspect.facts import inspect_file
from megatron_ds.data.readers import json_document
from megatron_ds.data.text.documents import TextSource
from tests.data.readers.files import FORMS, every_file, json_lines
from tests.data.readers.rows import CHAT_ROWS, ID_ROWS, TEXT_ROWS, TEXTS, ids_of, prepared
from tests.halves import halved


@pytest.fixture(scope="module", params=halved(sorted(every_file(TEXT_ROWS))))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.usefixtures("small_chunks")
def test_texts(name: str, write: Any, tokenizer_path: str, tmp_path: Path) -> None:
    source = write(name, every_file(TEXT_ROWS)[name])
    assert list(TextSource(source).documents()) == TEXTS
    assert prepared(tokenizer_path, tmp_path, source) == TEXTS
    facts = inspect_file(source, tokenizer_path, 9)
    assert facts.format == "text" and facts.lengths.count == 5
    shown = ["".join(piece.text for piece in one.documents[0].pieces) for one in facts.shown]
    assert shown == TEXTS


def test_token_ids(name: str, write: Any, open_: Any) -> None:
    dataset = open_("tokenized", write(name, every_file(ID_ROWS)[name]))
    assert ids_of(dataset) == [row["input_ids"] for row in ID_ROWS]
    assert dataset.sample(4)["targets"][:3].tolist() == [6, 7, -100]


def test_conversations(name: str, write: Any, open_: Any, chat_tokenizer: Any) -> None:
    source = write(name, every_file(CHAT_ROWS)[name])
    dataset = open_("chat", source)
    expected = open_("chat", write("expected.jsonl", json_lines(CHAT_ROWS)))
    for index in range(5):
        assert dataset.sample(index)["targets"].tolist() == expected.sample(index)["targets"].tolist()
    facts = inspect_file(source, chat_tokenizer("header"), 9)
    assert facts.format == "chat" and facts.lengths.count == 5
    learned = [piece.text for one in facts.shown for piece in one.documents[0].pieces if piece.learned]
    assert learned == [f"{row['messages'][1]['content']}<|eot|>" for row in CHAT_ROWS]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_documents_are_read_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number, a word, a character of several bytes and an escape may lie across two blocks."""
    monkeypatch.setattr(json_document, "_BLOCK_BYTES", block)
    rows = [*TEXT_ROWS, {"n": [12345, -1.5e-7, True, None], "text": '\\"' * 50}]
    for form in ("array.json", "pretty.json", "bom.json", "wrapped.json", "wrapped_pretty.json", "pretty_objects.json"):
        found = list(json_document.document_rows(io.BytesIO(FORMS[form](rows)), "a.json", ()))
        assert [one.value for one in found] == rows
    pretty = FORMS["pretty.json"](rows)
    starts = [pretty.index(json.dumps(text, ensure_ascii=False).encode()) for text in TEXTS]
    found = list(json_document.document_rows(io.BytesIO(pretty), "a.json", ()))
    assert [one.line for one in found[:5]] == [pretty.count(b"\n", 0, start) for start in starts]
