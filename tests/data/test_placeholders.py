"""Ids that stand for images are refused wherever a text holds one, by file, row, id and the field that names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, ChatOptions, open_dataset
from megatron_ds.data.indexed.files import write_index
from megatron_ds.data.readers import placeholders as module
from megatron_ds.data.readers.placeholders import Placeholders
from megatron_ds.errors import DataError

VOCAB_SIZE = 4096
IMAGE = VOCAB_SIZE - 1
PLACEHOLDERS = Placeholders({"vision_start_token_id": 5000, "image_token_id": IMAGE})
Open = Callable[..., Any]


def says(where: str) -> str:
    return (
        f"data: {where}: holds the id {IMAGE}, which is image_token_id in the model's config.json and stands for "
        "something else than text; only text is trained on: remove it"
    )


@pytest.fixture
def open_(tmp_path: Path, tokenizer_path: str, chat_tokenizer: Any) -> Open:
    def open__(format: str, source: str, placeholders: Placeholders = PLACEHOLDERS) -> Any:
        tokenizer, options = tokenizer_path, None
        if format == "chat":
            tokenizer, options = chat_tokenizer("header"), ChatOptions()
        return open_dataset(
            format,
            Causal(),
            [source],
            20,
            VOCAB_SIZE + 1,
            tokenizer,
            str(tmp_path / "cache"),
            options=options,
            placeholders=placeholders,
        )

    return open__


def refusal(open_: Open, format: str, source: str) -> str:
    with pytest.raises(DataError) as caught:
        open_(format, source)
    open_(format, source, Placeholders({"image_token_id": IMAGE + 1}))
    open_(format, source, Placeholders())
    return str(caught.value)


@pytest.mark.parametrize("again", [False, True], ids=["tokenized-now", "from-the-cache"])
def test_text(again: bool, open_: Open, tokenizer_path: str, write_jsonl: Any) -> None:
    """The row counts lines, empty documents too, as errors of rows do."""
    word = AutoTokenizer.from_pretrained(tokenizer_path).decode([IMAGE])
    rows = ["a whale " * 20, "", "a ship", f"of{word}", f"and{word}"]
    source = write_jsonl([{"text": text} for text in rows])
    if again:
        open_("text", source, Placeholders())
    assert refusal(open_, "text", source) == says(f"{source}:4")
    open_("text", write_jsonl([{"text": rows[0]}], "plain.jsonl"))


def test_chat(open_: Open, chat_tokenizer: Any, write_jsonl: Any) -> None:
    (token,) = AutoTokenizer.from_pretrained(chat_tokenizer("header")).encode(" whale", add_special_tokens=False)
    rows = [["hi", "ho"], ["see", "no whale"]]
    source = write_jsonl(
        [
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}
            for user, assistant in rows
        ]
    )
    with pytest.raises(DataError) as caught:
        open_("chat", source, Placeholders({"image_token_id": token}))
    assert str(caught.value) == says(f"{source}:2").replace(str(IMAGE), str(token))
    open_("chat", source)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_tokenized(column: str, open_: Open, write_jsonl: Any) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} for _ in range(3)]
    rows[1] = {**rows[1], column: [1, IMAGE, 3]}
    source = write_jsonl(rows)
    assert refusal(open_, "tokenized", source) == says(f"{source}:2: {column}")


def test_indexed(open_: Open, tmp_path: Path) -> None:
    """At the sample: all tokens are never read at once."""
    prefix, lengths = str(tmp_path / "corpus"), [20, 7, 30, 9]
    tokens = np.arange(sum(lengths), dtype="<u2")
    tokens[20 + 7] = IMAGE
    tokens.tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), tokens.dtype, lengths, list(range(len(lengths) + 1)))
    dataset = open_("indexed", prefix)
    dataset.sample(0)
    with pytest.raises(DataError) as caught:
        dataset.sample(1)
    assert str(caught.value) == says(f"{prefix}: sequence 2")
    open_("indexed", prefix, Placeholders()).sample(1)


@pytest.mark.parametrize("position", [0, 6, 7, 8, 20])
def test_every_block_is_searched(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    ids = np.full(21, 6000, dtype=np.int32)
    assert PLACEHOLDERS.find(ids) is None and PLACEHOLDERS.find(ids[:0]) is None
    ids[position] = IMAGE
    assert PLACEHOLDERS.find(ids) == position
