"""Samples as text: what is under loss and nothing else is marked, and no character is lost where marks begin."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data import Causal, ChatOptions, GlobalBatches, Masked, Seq2Seq, load_tokenizer, open_dataset
from megatron_ds.data.inspect.rendering import (
    RenderedSample,
    first_samples,
    render,
    render_sample,
    split_by_loss,
    unpadded_length,
)


def shown(data: Any, index: int, path: str | None, shifted: bool = True) -> RenderedSample:
    return render_sample(index, data.sample(index), load_tokenizer(path) if path is not None else None, shifted)


def texts(sample: RenderedSample, learned: bool) -> list[str]:
    return [piece.text for document in sample.documents for piece in document.pieces if piece.learned == learned]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "sentencepiece"])
def test_pieces_make_the_whole_text_whatever_is_marked(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    said = "the whale swam unhesitatingly, a café of naïve 🙂 whales — and so on"
    ids = np.asarray(tokenizer(said, add_special_tokens=False)["input_ids"])
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    chance = np.random.default_rng(0)
    for _ in range(50):
        learned = chance.random(len(ids)) < 0.5
        pieces = split_by_loss(ids, learned, tokenizer)
        assert "".join(piece.text for piece in pieces) == whole
        assert [piece.learned for piece in pieces] == [
            bool(one) for place, one in enumerate(learned) if place == 0 or learned[place - 1] != one
        ]
    assert split_by_loss(ids[:0], learned[:0], tokenizer) == ()


def test_a_character_of_several_tokens_is_where_it_ends(byte_level: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids = np.asarray(tokenizer("a🙂b", add_special_tokens=False)["input_ids"])
    assert len(ids) == 6
    pieces = split_by_loss(ids, np.arange(6) == 4, tokenizer)
    assert [(piece.text, piece.learned) for piece in pieces] == [("a", False), ("🙂", True), ("b", False)]


def test_without_a_tokenizer_there_are_ids() -> None:
    pieces = split_by_loss(np.array([5, 6, 7]), np.array([False, True, True]), None)
    assert [(piece.text, piece.learned) for piece in pieces] == [("5 ", False), ("6 7", True)]


def test_a_long_document_is_cut_and_counted() -> None:
    document = render((np.arange(10), np.arange(10) > 4), None, most=6)
    assert (document.tokens, document.learned, document.hidden) == (10, 5, 4)
    assert document.pieces[-1].text == "5"


def test_text_of_a_causal_model(tmp_path: Path, byte_level: str) -> None:
    """All but the first token is learned, the one behind the sample too."""
    (tmp_path / "a.txt").write_text("some whales swim in the sea, and some do not " * 9)
    data = open_dataset("text", Causal(), [str(tmp_path / "a.txt")], 16, 700, byte_level, str(tmp_path / "cache"))
    found = shown(data, 1, byte_level)
    (document,) = found.documents
    tokens = [*data.sample(1)["input_ids"].tolist(), int(data.sample(1)["targets"][-1])]
    assert (document.tokens, document.learned, found.padding) == (17, 16, 0)
    assert "".join(piece.text for piece in document.pieces) == load_tokenizer(byte_level).decode(tokens)
    assert [piece.learned for piece in document.pieces] == [False, True]


@pytest.mark.parametrize("packing", [False, True])
def test_conversations(tmp_path: Path, chat_tokenizer: Any, packing: bool) -> None:
    rows = [("call me?", "ishmael"), ("some years?", "ago!"), ("never mind", "how long precisely")]
    lines = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}
        for said, answer in rows
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, cache, chat = chat_tokenizer("header"), str(tmp_path / "cache"), ChatOptions(packing=packing)
    data: Any = open_dataset("chat", Causal(), [str(tmp_path / "chat.jsonl")], 150, 4096, path, cache, options=chat)
    samples = [shown(data, index, path) for index in range(len(data))]
    documents = [document for sample in samples for document in sample.documents]
    assert len(samples) == (1 if packing else 3) and len(documents) == 3
    for document, (said, answer), length in zip(documents, rows, data.lengths):
        learned = [piece.text for piece in document.pieces if piece.learned]
        assert len(learned) == 1 and learned[0].startswith(answer) and learned[0].endswith("<|eot|>")
        assert said in "".join(piece.text for piece in document.pieces if not piece.learned)
        assert document.tokens == length
    assert sum(sample.padding for sample in samples) == len(samples) * 150 - sum(data.lengths)


def test_padding_is_told_from_a_token_of_that_id(write_jsonl: Any) -> None:
    rows = [
        {"input_ids": [5, 0, 0], "position_ids": [0, 1, 0]},  # a document of one token, whose id is 0
        {"input_ids": [5, 6, 0]},  # learned
        {"input_ids": [5, 6, 0], "labels": [-100, 6, -100], "attention_mask": [1, 1, 1]},
        {"input_ids": list(range(1, 9))},
    ]
    found = []
    for row in rows:
        path = write_jsonl([row], f"{len(found)}.jsonl")
        sample = open_dataset("tokenized", Causal(), [str(path)], 8, 61).sample(0)
        found.append((render_sample(0, sample, None, True).padding, unpadded_length(sample)))
    assert found == [(5, 3), (5, 3), (5, 3), (0, 8)]


def test_a_masked_model_is_to_predict_what_is_hidden(valid_text: Path, wordpiece: str, tmp_path: Path) -> None:
    objective = Masked(seed=1, next_sentence=False, num_token_types=2, padding_id=0, mask_rate=0.2, whole_words=False)
    data = open_dataset("text", objective, [str(valid_text)], 32, 700, wordpiece, str(tmp_path))
    sample = shown(data, 0, wordpiece, shifted=False)
    masker_saw = data.sample(0)["targets"]
    assert sample.documents[0].learned == (masker_saw != -100).sum() == 6
    whole = "".join(piece.text for piece in sample.documents[0].pieces)
    assert "[MASK]" not in whole and whole.startswith("[CLS]") and whole.endswith("[SEP]")


def test_an_encoder_decoder_reads_one_thing_and_writes_another(
    valid_text: Path, sentencepiece: str, tmp_path: Path
) -> None:
    objective = Seq2Seq(seed=1, decoder_start_id=0, padding_id=0, target_length=None, mask_rate=0.15, mean_span=3.0)
    data = open_dataset("text", objective, [str(valid_text)], 64, 700, sentencepiece, str(tmp_path))
    inputs, targets = shown(data, 0, sentencepiece).documents
    assert (inputs.name, inputs.learned, targets.name) == ("input", 0, "target")
    assert targets.learned == targets.tokens == (data.sample(0)["targets"] != -100).sum()
    for document in (inputs, targets):
        assert "<extra_id_0>" in document.pieces[0].text and len(document.pieces) == 1


def test_the_first_samples_are_those_of_the_first_steps(write_jsonl: Any) -> None:
    path = write_jsonl([{"input_ids": [number, number]} for number in range(10)], "numbers.jsonl")
    data = open_dataset("tokenized", Causal(), [str(path)], 4, 61)
    order = GlobalBatches(10, 4, 7, shuffle=True)
    taken = [(index, int(sample["input_ids"][0])) for index, sample in first_samples(data, order, 13)]
    expected = np.concatenate([order.indices(step) for step in range(4)])[:13] % 10
    assert taken == [(int(index), int(index)) for index in expected]
