"""Documents tokenized in windows: the ids of one piece, for every kind of tokenizer and text, and progress."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_ds.data import load_tokenizer
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.prepare import PrepareOptions, State, prepare
from megatron_ds.data.readers import long_text
from megatron_ds.data.readers.long_text import encode_documents, encode_long, is_long


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "WINDOW", 1500)
    monkeypatch.setattr(long_text, "OVERLAP", 500)
    monkeypatch.setattr(long_text, "GUARD", 150)


def odd_text(book: Path) -> str:
    """Prose between runs of spaces, digits, other scripts, combining marks, special tokens and one letter."""
    chance, prose = random.Random(0), book.read_text(encoding="utf-8")
    made: list[str] = []
    for _ in range(150):
        start, size = chance.randrange(len(prose) - 900), chance.randrange(1, 60)
        made += [prose[start : start + 300], chance.choice((" ", "\n", "\r\n", "\t", "x", "=-", "é", "</s>")) * size]
        made += ["".join(chance.choice(("\u0301", "語", "😀", "7", "Ⅷ", "don't")) for _ in range(size))]
    return "".join(made)


def whole(tokenizer: object, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["book's", "byte_level", "wordpiece", "sentencepiece"])
def test_windows_give_the_ids_of_one_piece(
    kind: str, book: Path, tokenizer_path: str, byte_level: str, wordpiece: str, sentencepiece: str
) -> None:
    paths = {"byte_level": byte_level, "wordpiece": wordpiece, "sentencepiece": sentencepiece}
    tokenizer = load_tokenizer(paths.get(kind, tokenizer_path))
    for text in (odd_text(book), book.read_text(encoding="utf-8")[:60_000]):
        pieces = list(encode_long(tokenizer, text))
        assert len(pieces) > 10, "windows meet in most overlaps"
        assert np.concatenate([ids for ids, _ in pieces]).tolist() == whole(tokenizer, text)
        parts = [done for _, done in pieces]
        assert parts == sorted(parts) and parts[-1] == 1.0 and parts[0] < 0.1


def test_windows_that_disagree_are_encoded_as_one(wordpiece: str) -> None:
    """Pairs of a letter 5,001 times, which begin otherwise in each window; one unknown word of WordPiece."""
    pairs = Tokenizer(models.BPE({"a": 0, "aa": 1, "?": 2}, [("a", "a")], unk_token="?"))
    pairs.pre_tokenizer = WhitespaceSplit()
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=pairs), load_tokenizer(wordpiece)):
        text = "x" + "call me " * 300 + "a" * 5001 + " ishmael" * 300
        pieces = list(encode_long(tokenizer, text))
        assert np.concatenate([ids for ids, _ in pieces]).tolist() == whole(tokenizer, text)
        assert 1 < len(pieces) < 7, "of ten windows, those within the word are one"


def test_long_and_short_documents_keep_their_order(byte_level: str, book: Path) -> None:
    tokenizer, prose = load_tokenizer(byte_level), book.read_text(encoding="utf-8")
    documents = ["call", prose[:9000], "me", "", prose[9000:20_000]]
    assert [is_long(one) for one in documents] == [False, True, False, False, True]
    assert [ids.tolist() for ids in encode_documents(tokenizer, documents)] == [
        whole(tokenizer, one) for one in documents
    ]
    plain = ByT5Tokenizer()
    assert encode_documents(plain, documents)[1].tolist() == whole(plain, documents[1])


def test_prepare_of_a_long_document_reports_progress(
    byte_level: str, book: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    prose = book.read_text(encoding="utf-8")[:60_000]
    (tmp_path / "book.txt").write_text(prose, encoding="utf-8")
    lines = write_jsonl([{"text": text} for text in ("call", prose[:9000], "me", prose[:5])])
    seen: list[tuple[int, int]] = []

    def progress(state: State, total: int) -> None:
        seen.append((state.bytes, state.documents))

    options = PrepareOptions([str(tmp_path / "book.txt"), lines], byte_level, str(tmp_path / "out"), workers=2)
    prepare(options, progress=progress)
    read = [size for size, _ in seen]
    assert read == sorted(read) and len([one for one, documents in seen if documents == 0 and one]) > 10
    tokenizer, file = load_tokenizer(byte_level), IndexedFile(str(tmp_path / "out"))
    end = tokenizer.eos_token_id
    expected = [[*whole(tokenizer, one), end] for one in (prose, "call", prose[:9000], "me", prose[:5])]
    assert [file.read(number).tolist() for number in range(len(file))] == expected
