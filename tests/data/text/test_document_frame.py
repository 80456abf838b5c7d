"""Documents of text begin with what the tokenizer itself puts before a text, for `data.format: text` and `prepare`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, Order, open_dataset
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.parts import begins_documents, ends_of
from megatron_ds.data.prepare import PrepareOptions, prepare
from megatron_ds.data.readers.document_frame import document_frame, leading_ids
from megatron_ds.errors import DataError
from tests.data.tiny_tokenizers import FRAMED_VOCABULARY as VOCABULARY
from tests.data.tiny_tokenizers import save_framed

TEXTS = ["a b", "b", "a a a b"]
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a tokenizer whose post-processor is `single` (empty: none) and gives its directory."""

    def make(single: str, name: str = "tok", **special: str | None) -> str:
        return save_framed(tmp_path / name, single, **special)

    return make


@pytest.fixture
def texts(write_jsonl: Any) -> str:
    return write_jsonl([{"text": text} for text in TEXTS])


def stream(tokenizer: str, source: str, tmp_path: Path, bos: Any = "auto") -> list[int]:
    data = open_dataset("text", Causal(bos), [source], 1, 6, tokenizer, str(tmp_path / "cache"))
    samples = [data.sample(index) for index in range(len(data))]
    return [int(samples[0]["input_ids"][0]), *(int(sample["targets"][0]) for sample in samples)]


def framed(begin: Sequence[int]) -> list[int]:
    return [token for text in TEXTS for token in (*begin, *(VOCABULARY[word] for word in text.split()), 0)]


@pytest.mark.parametrize(
    ("single", "begin"),
    [
        ("", ()),
        ("$A", ()),
        ("$A <eos>", ()),  # T5's, Qwen's embedding models: its own end is not doubled
        ("<bos> $A", (2,)),  # Llama, Gemma
        ("<bos> $A <eos>", (2,)),
        ("<gmask> <bos> $A", (3, 2)),  # GLM
    ],
)
def test_text_begins_with_what_the_tokenizer_puts_before_it(
    save: Save, texts: str, tmp_path: Path, single: str, begin: tuple[int, ...]
) -> None:
    tokenizer = save(single)
    assert stream(tokenizer, texts, tmp_path) == framed(begin)
    whole = AutoTokenizer.from_pretrained(tokenizer)
    expected = [token for text in TEXTS for token in [*(one for one in whole(text)["input_ids"] if one), 0]]
    assert framed(begin) == expected, "the tokenizer's own call, and an end"


def test_bos_can_be_asked_for_and_left_out(save: Save, texts: str, tmp_path: Path) -> None:
    assert stream(save("<bos> $A"), texts, tmp_path, False) == framed(())
    plain = save("$A", "plain")
    assert stream(plain, texts, tmp_path, True) == framed((2,))
    assert stream(plain, texts, tmp_path, "auto") == framed(())
    with pytest.raises(DataError, match=r"bos_token is not set, but data.bos=true begins each document with it"):
        stream(save("$A", "none", bos_token=None), texts, tmp_path, True)  # type: ignore[arg-type]


def test_padding_of_a_tokenizer_is_no_beginning(save: Save) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save("<bos> $A"))
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=12, pad_id=5, pad_token="b")
    assert leading_ids(tokenizer) == (2,)


def test_a_tokenizer_without_a_backend(save: Save) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [7, 4, 0] if add_special_tokens else [4]}

    assert leading_ids(Slow()) == (7,)  # type: ignore[arg-type]


def test_the_frame_says_what_it_teaches(save: Save, texts: str, tmp_path: Path) -> None:
    path = save("<bos> $A")
    frame = document_frame(AutoTokenizer.from_pretrained(path), path, "auto", "it is needed")
    assert (frame.begin_text, frame.ends) == ("<bos>", {0: "<eos>"})
    cache = str(tmp_path / "cache")
    data = open_dataset("text", Causal(), [texts], 4, 6, path, cache)
    assert data.describe() == "13 tokens, 3 samples of 4, <bos> before each document"
    blend = open_dataset(
        "text", Causal(), [texts, texts], 4, 6, path, cache, weights=[1, 1], order=Order(4, 0, shuffle=True)
    )
    assert begins_documents(blend) and ends_of(blend) == {0: "<eos>"}


def test_only_a_beginning_changes_the_cache(save: Save, texts: str, tmp_path: Path) -> None:
    """The names of old caches: tokenizers that put nothing before a text find what they wrote."""
    cache = tmp_path / "cache"

    def names(single: str, bos: Any) -> set[str]:
        before = {file.name for file in cache.glob("*.bin")}
        stream(save(single, f"tok{len(before)}"), texts, tmp_path, bos)
        return {file.name for file in cache.glob("*.bin")} - before

    assert len(names("$A", "auto")) == 1
    assert names("$A", False) == set(), "the same"
    assert len(names("<bos> $A", "auto")) == 1
    assert len(names("<bos> $A", False)) == 1, "as written by versions without a beginning"


@pytest.mark.parametrize(
    ("single", "given", "begin"),
    [
        ("$A", {}, ()),
        ("<bos> $A", {}, (2,)),
        ("<bos> $A <eos>", {}, (2,)),
        ("<bos> $A", {"bos": False}, ()),
        ("$A", {"bos": True}, (2,)),
    ],
)
def test_prepare_begins_documents_likewise(
    save: Save, texts: str, tmp_path: Path, single: str, given: Any, begin: tuple[int, ...]
) -> None:
    options = PrepareOptions([texts], save(single), str(tmp_path / "out"), workers=1, **given)
    manifest = prepare(options).manifest
    file = IndexedFile(str(tmp_path / "out"))
    assert np.concatenate([file.read(number) for number in range(len(file))]).tolist() == framed(begin)
    assert manifest.get("begin_ids", []) == list(begin) and ("begin_ids" in manifest) == bool(begin)
    bare = prepare(replace(options, append_eod=False, prefix=str(tmp_path / "bare"))).manifest
    assert manifest["num_tokens"] - bare["num_tokens"] == len(TEXTS)


def test_data_prepared_without_a_beginning_are_named(save: Save, texts: str, tmp_path: Path) -> None:
    options = PrepareOptions([texts], save("<bos> $A"), str(tmp_path / "out"), workers=1, bos=False)
    prepare(options)
    assert prepare(options).unchanged
    with pytest.raises(DataError, match=r"exists, with other data whose documents begin without .*\[2\] \(--no-bos\);"):
        prepare(replace(options, bos="auto"))
