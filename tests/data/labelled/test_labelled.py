"""Labelled rows: tokens as transformers' pipelines make them, labels as the model numbers them, and each refusal."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from megatron_ds.config import build_run
from megatron_ds.data import FORMATS, Causal, Labelled, Masked, Order, check_format, collate, open_dataset
from megatron_ds.data.held_out import HeldOut
from megatron_ds.data.readers.source import Source
from megatron_ds.errors import ConfigError, DataError
from tests.data.tiny_tokenizers import VOCAB_SIZE

X = -100
SENTIMENT = Labelled("single_label_classification", ("negative", "neutral", "positive"))
TOPICS = Labelled("multi_label_classification", ("sea", "land", "sky"))
SCORE = Labelled("regression", ("LABEL_0",))
ENTITIES = Labelled("single_label_classification", ("O", "B-PER", "I-PER"), of_words=True)
Write = Callable[..., str]


@pytest.fixture(scope="module")
def bert(wordpiece: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As BERT's, with its special tokens around texts and its segments."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(wordpiece, model_input_names=names)
    special = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    directory = tmp_path_factory.mktemp("bert")
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def opened(tmp_path: Path, bert: str) -> Callable[..., Any]:
    """Opens sources as labelled data; the tokenizer is BERT-like unless another one is given."""

    def open_labelled(objective: Labelled, *sources: Any, seq_length: int = 16, tokenizer: str = bert) -> Any:
        cache = str(tmp_path / "cache")
        return open_dataset("labelled", objective, sources, seq_length, VOCAB_SIZE, tokenizer, cache)

    return open_labelled


@pytest.fixture
def refused(opened: Any, write_jsonl: Write) -> Callable[..., str]:
    """The error for a file of these rows, without its place."""

    def message(objective: Labelled, *rows: Any, **options: Any) -> str:
        with pytest.raises(DataError) as caught:
            opened(objective, write_jsonl(rows, "bad.jsonl"), **options)
        return str(caught.value).partition("bad.jsonl")[2] or str(caught.value)

    return message


def test_samples_are_what_the_tokenizer_gives_transformers(opened: Any, write_jsonl: Write, request: Any) -> None:
    """Special tokens, pairs, segments and cuts, for three kinds of tokenizers; padded with the model's id."""
    texts = ["call me", "some years ago never mind how long precisely " * 2, "having little"]
    pairs = [None, "or no money in my purse and nothing particular", None]
    rows = [
        {"text": text, "label": "neutral", **({"text_pair": pair} if pair else {})} for text, pair in zip(texts, pairs)
    ]
    path = write_jsonl(rows)
    objective = Labelled("single_label_classification", SENTIMENT.classes, padding_id=9, num_token_types=2)
    for name in ("bert", "byte_level", "sentencepiece"):
        directory = request.getfixturevalue(name)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        data = opened(objective, path, tokenizer=directory)
        assert data.columns == ("input_ids", "attention_mask", "token_type_ids", "label")
        for index, (text, pair) in enumerate(zip(texts, pairs)):
            given = {"text": text, **({"text_pair": pair} if pair else {})}
            expected = tokenizer(**given, truncation=True, max_length=16)
            ids, sample = expected["input_ids"], data.sample(index)
            rest = 16 - len(ids)
            assert sample["input_ids"].tolist() == ids + [9] * rest
            assert sample["attention_mask"].tolist() == [True] * len(ids) + [False] * rest
            types = expected.get("token_type_ids", [0] * len(ids))
            assert sample["token_type_ids"].tolist() == types + [0] * rest
            assert sample["label"] == 1 and sample["label"].shape == ()
        assert len(data.row(1)[0]) == 16


def test_segments_of_a_pair(opened: Any, write_jsonl: Write, bert: str, wordpiece: str) -> None:
    """As the tokenizer gives them; one that gives none gives them to no model of transformers either."""
    path = write_jsonl([{"text": "call me", "text_pair": "some years", "label": 0}])
    objective = Labelled("single_label_classification", SENTIMENT.classes, num_token_types=2)
    types = opened(objective, path).sample(0)["token_type_ids"]
    expected = AutoTokenizer.from_pretrained(bert)("call me", "some years")["token_type_ids"]
    assert types[: len(expected)].tolist() == expected and sum(expected) > 0
    assert not opened(objective, path, tokenizer=wordpiece).sample(0)["token_type_ids"].any()
    three = Labelled("single_label_classification", SENTIMENT.classes)
    assert "token_type_ids" not in opened(three, path).columns


def test_cut_rows_are_counted_and_said(opened: Any, write_jsonl: Write, bert: str, caplog: Any) -> None:
    rows = [{"text": "call me " * number, "label": 0} for number in (1, 20, 30)]
    with caplog.at_level(logging.INFO, logger="megatron_ds"):
        data = opened(SENTIMENT, write_jsonl(rows))
    longest = max(len(AutoTokenizer.from_pretrained(bert)(row["text"])["input_ids"]) for row in rows)
    assert f"2 of 3 rows are cut to data.seq_length=16; the longest has {longest} tokens" in caplog.text
    assert " to 16 tokens (2 cut), padded to 16; negative 3, neutral 0, positive 0" in data.describe()


@pytest.mark.parametrize(
    ("objective", "rows", "labels"),
    [
        (
            SENTIMENT,
            [{"label": "positive"}, {"label": 0}, {"label": 1.0}, {"label": -100}, {"label": "2"}],
            [2, 0, 1, X, 2],
        ),
        (TOPICS, [{"labels": ["sky", "sea"]}, {"labels": []}, {"labels": [1]}], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        (TOPICS, [{"scores": [0.25, 1, 0]}], [[0.25, 1, 0]]),
        (SCORE, [{"score": 2.5}, {"label": -3}, {"scores": [7]}, {"score": "1e-1"}], [[2.5], [-3], [7], [0.1]]),
        (Labelled("regression", ("a", "b")), [{"scores": [1, -1]}], [[1, -1]]),
    ],
)
def test_labels(objective: Labelled, rows: Any, labels: Any, opened: Any, write_jsonl: Write) -> None:
    data = opened(objective, write_jsonl([{"text": "call me", **row} for row in rows]))
    column = objective.label_column.name
    found = collate(data, [*range(len(rows)), -1])[column].numpy()
    np.testing.assert_array_equal(found[:-1], np.asarray(labels, dtype=found.dtype))
    assert not objective.label_column.carries_loss(found[-1]).any(), "the blank sample has no label"


def test_numbers_of_classes_that_are_names(opened: Any, write_jsonl: Write) -> None:
    """A text that is a name is that class, even where it looks like the number of another."""
    stars = Labelled("single_label_classification", ("1", "2", "3"))
    data = opened(stars, write_jsonl([{"text": "call", "label": "1"}, {"text": "call", "label": 1}]))
    assert [int(data.sample(index)["label"]) for index in (0, 1)] == [0, 1]


def test_the_first_token_of_a_word_has_its_class(opened: Any, write_jsonl: Write, bert: str) -> None:
    words, tags = ["Ishmael", "whaleships", "precisely", "sea"], ["B-PER", "I-PER", 0, -100]
    data = opened(ENTITIES, write_jsonl([{"tokens": words, "tags": tags}]), seq_length=32)
    encoded = AutoTokenizer.from_pretrained(bert)(words, is_split_into_words=True)
    expected, before = [], None
    for word in encoded.word_ids():
        expected.append(X if word is None or word == before else [1, 2, 0, X][word])
        before = word
    sample = data.sample(0)
    assert sample["token_label"].tolist() == expected + [X] * (32 - len(expected))
    assert len(expected) > len(words) + 2, "some words have several tokens"
    assert data.describe().endswith("; words: O 1, B-PER 1, I-PER 1")
    cut = opened(ENTITIES, write_jsonl([{"tokens": words, "tags": tags}]), seq_length=4)
    assert cut.sample(0)["token_label"].tolist() == [*expected[:3], X]


def test_words_of_a_tokenizer_with_spaces(
    opened: Any, refused: Any, write_jsonl: Write, byte_level: str, tmp_path: Path
) -> None:
    """RoBERTa's and GPT-2's have other ids for a word after a space, and a list of words has none."""
    row = {"tokens": ["call", "me"], "tags": ["O", "O"]}
    said = refused(ENTITIES, row, tokenizer=byte_level)
    assert "gives the words of a list other ids than in their text" in said
    assert 'set "add_prefix_space": true in its tokenizer_config.json' in said


def test_file_kinds_and_names(opened: Any, tmp_path: Path) -> None:
    """CSV, parquet and renamed fields give the same samples as JSON lines; hidden order, nulls and extra fields do not
    matter."""
    rows = [("call me", "positive"), ("some years", "negative")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "label": c, "id": 7}) for t, c in rows))
    (tmp_path / "b.csv").write_text("label,text\n" + "\n".join(f"{c},{t}" for t, c in rows))
    table = {"review": [t for t, _ in rows], "stars": [c for _, c in rows], "text_pair": [None, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
    columns = (("label", "stars"), ("text", "review"))
    first, *others = (
        opened(SENTIMENT, Source(str(tmp_path / name), columns=renamed))
        for name, renamed in (("a.jsonl", ()), ("b.csv", ()), ("c.parquet", columns))
    )
    for other in others:
        for index in range(2):
            for name, array in first.sample(index).items():
                np.testing.assert_array_equal(array, other.sample(index)[name])
    (tmp_path / "d.csv").write_text('text,labels,tokens\ncall,"[""sky"", 0]",\n')
    assert opened(TOPICS, str(tmp_path / "d.csv")).sample(0)["label_scores"].tolist() == [1, 0, 1]


def test_numbers_of_a_table_in_another_order(opened: Any, tmp_path: Path, caplog: Any) -> None:
    """A table that names its numbers otherwise would have other classes in silence."""

    def saved(name: str, names: list[str]) -> str:
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        table = datasets.Dataset.from_dict({"text": ["call", "me"], "label": [0, 1]}, features=features)
        table.save_to_disk(str(tmp_path / name))
        return str(tmp_path / name)

    same = opened(SENTIMENT, saved("same", list(SENTIMENT.classes)))
    assert [int(same.sample(index)["label"]) for index in (0, 1)] == [0, 1]
    with pytest.raises(
        DataError, match=r"are positive, neutral, negative, and those of the model negative, neutral, p"
    ):
        opened(SENTIMENT, saved("other", ["positive", "neutral", "negative"]))
    with caplog.at_level(logging.INFO, logger="megatron_ds"):
        opened(SENTIMENT, saved("named", ["neg", "neu", "pos"]))
    assert "are neg, neu, pos, and are taken for negative, neutral, positive" in caplog.text


@pytest.mark.parametrize(
    ("objective", "row", "says"),
    [
        (
            SENTIMENT,
            {"label": "postive"},
            ":1: label=postive is not one of the model's 3 classes (negative, neutral, positive); nearest: positive",
        ),
        (SENTIMENT, {"label": 3}, ":1: label=3 is no number of a class: the model has 3, 0 to 2, and -100 is ignored"),
        (SENTIMENT, {"label": -1}, "-100 is ignored; rows without a label have no place here"),
        (SENTIMENT, {"label": True}, ":1: label=true is neither the name nor the number of a class"),
        (SENTIMENT, {"label": 0.5}, ":1: label=0.5 is neither the name nor the number"),
        (
            SENTIMENT,
            {"labels": ["neutral"]},
            ":1: no label, which this model (single_label_classification) learns, but the row has labels; choose the",
        ),
        (
            SENTIMENT,
            {"class": "neutral"},
            "but the row has only class, text; name the one that holds it in data.columns.label",
        ),
        (SENTIMENT, {"label": 1, "text": 7}, ":1: field 'text' holds int; it must hold a string"),
        (SENTIMENT, {"label": 1, "text": None}, ":1: no field 'text'"),
        (SENTIMENT, {"label": 1, "text_pair": 7}, ":1: field 'text_pair' holds int"),
        (
            Labelled("single_label_classification", ("LABEL_0", "LABEL_1")),
            {"label": "good"},
            ":1: label=good is a name, and the model's 2 classes have none: write numbers, or name them in model.head",
        ),
        (
            Labelled("single_label_classification", ("a", "b", "a")),
            {"label": "a"},
            ":1: label=a is the name of several of the model's classes (0, 2); write the number",
        ),
        (TOPICS, {"labels": "sea"}, ":1: labels=sea is no list"),
        (SENTIMENT, {"label": None}, ":1: label is null, and this model (single_label_classification) learns it; give"),
        (TOPICS, {"labels": ["sea", 0]}, "names the classes of a row, each once"),
        (TOPICS, {"labels": [1.0, 0.0]}, "numbers such as [0.0, 1.0] for all classes belong in scores"),
        (TOPICS, {"labels": [-100]}, "names the classes of a row, each once"),
        (TOPICS, {"scores": [0, 2, 0]}, ":1: scores holds 2; of a class it is between 0 and 1"),
        (TOPICS, {"scores": [0, 1]}, ":1: scores=[0, 1] holds 2 numbers; the model has 3 outputs"),
        (SCORE, {"score": "high"}, ":1: score=high is not a finite number"),
        (SCORE, {"score": float("nan")}, "is not a finite number"),
        (SCORE, {"score": 1e39}, ":1: score=1e+39 is more than fp32 holds"),
        (SCORE, {"score": False}, ":1: score=false is not a finite number"),
        (
            ENTITIES,
            {"tokens": ["a", "b"], "tags": ["O"]},
            ":1: tags has 1 entries, and tokens has 2; each word needs one",
        ),
        (ENTITIES, {"tokens": "a b", "tags": ["O"]}, ":1: tokens must be a list of words, found a b"),
        (
            ENTITIES,
            {"tokens": ["a"], "tags": ["PER"]},
            ":1: tags=PER is not one of the model's 3 classes (O, B-PER, I-PER); nearest: I-PER",
        ),
        (ENTITIES, {"label": 0}, ":1: no tags, which this model (a class of each word) learns, but the row has label"),
    ],
)
def test_what_rows_are_refused_for(objective: Labelled, row: Any, says: str, refused: Any) -> None:
    said = refused(objective, {"text": "call me", **row})
    assert says in said and "\n" not in said


def test_lengths_and_ids_that_do_not_fit(
    refused: Any, wordpiece: str, opened: Any, write_jsonl: Write, tmp_path: Path
) -> None:
    row = {"text": "call me", "label": 0}
    assert "data.seq_length=3 leaves no room for text next to 3 special tokens; nearest: 4" in refused(
        SENTIMENT, row, seq_length=3
    )
    with pytest.raises(DataError, match=r"gives ids up to \d+, but the model's vocab_size=5 ends at 4"):
        open_dataset("labelled", SENTIMENT, [write_jsonl([row])], 16, 5, wordpiece, str(tmp_path / "cache"))
    assert "no rows; each line or row must hold a text and its label" in refused(SENTIMENT, b"")


def test_bad_rows_are_left_out(opened: Any, write_jsonl: Write) -> None:
    path = write_jsonl([{"text": "call", "label": 1}, {"text": "call", "label": "x"}, b"{", {"text": "me", "label": 2}])
    data = opened(SENTIMENT, Source(path, skip_bad=True))
    assert (len(data), data.bad_rows.count) == (2, 2) and data.bad_rows.first[0].startswith(f"{path}:2: label=x ")
    assert "(2 bad rows left out)" in data.describe()
    with pytest.raises(DataError, match=r":2: label=x "):  # from the cache, in a run that refuses them
        opened(SENTIMENT, path)


def test_the_fingerprint_follows_what_decides_samples(opened: Any, write_jsonl: Write, byte_level: str) -> None:
    rows = [{"text": "call me", "label": 1}, {"text": "some", "label": 0}]
    path = write_jsonl(rows)
    first = opened(SENTIMENT, path).fingerprint
    assert first == opened(SENTIMENT, write_jsonl(rows, "moved.jsonl")).fingerprint
    others = [
        opened(Labelled("single_label_classification", ("positive", "neutral", "negative")), path),
        opened(Labelled("single_label_classification", SENTIMENT.classes, padding_id=3), path),
        opened(SENTIMENT, path, seq_length=8),
        opened(SENTIMENT, path, tokenizer=byte_level),
        opened(SENTIMENT, write_jsonl([rows[0], {**rows[1], "label": 2}], "other.jsonl")),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 6


def test_formats_and_models_that_do_not_fit(opened: Any, write_jsonl: Write, wordpiece: str) -> None:
    path = write_jsonl([{"text": "call me", "label": 1}])
    for name in ("text", "chat", "tokenized", "indexed"):
        with pytest.raises(
            ConfigError, match=f"^data.format={name} has no labels, and the model has a label head; try"
        ):
            open_dataset(name, SENTIMENT, [path], 16, VOCAB_SIZE, wordpiece)
    for objective in (Causal(), Masked(seed=0)):
        with pytest.raises(
            ConfigError, match=r"^data.format=labelled is for models with a label head, and this one ha"
        ):
            open_dataset("labelled", objective, [path], 16, VOCAB_SIZE, wordpiece)
    run = build_run(
        {
            "model": {"path": "x"},
            "data": {"format": "labelled", "train": [path], "columns": {"label": "y"}},
            "train": {"steps": 1},
            "output": "out",
        }
    )
    check_format(run.data, "x")
    with pytest.raises(ConfigError, match=r"^model.tokenizer is missing: data.format=labelled"):
        check_format(run.data, None)
    assert FORMATS["labelled"].fields[0] == "text"


def test_blends_and_shares_have_scores_too(write_jsonl: Write, bert: str, tmp_path: Path) -> None:
    paths = [write_jsonl([{"text": "call me", "scores": [0, 1, number]}] * 4, f"{number}.jsonl") for number in (0, 1)]
    options: Any = {"tokenizer_path": bert, "cache_dir": str(tmp_path / "cache"), "seq_length": 8}
    options |= {"format": "labelled", "objective": TOPICS, "sources": paths, "vocab_size": VOCAB_SIZE}
    blend = open_dataset(**options, weights=[0.5, 0.5], order=Order(8, 0, True))
    found = collate(blend, range(8))["label_scores"]
    assert found.shape == (8, 3) and found[:, 2].sum() == 4
    share = open_dataset(**options, held_out=HeldOut(0.25, True))
    assert collate(share, [0, 1, -1])["label_scores"].shape == (3, 3)


def test_a_tokenizer_that_pads_with_another_id_than_the_head_skips_is_refused(
    opened: Any, write_jsonl: Write, byte_level: str
) -> None:
    """transformers would read the head at the padding of a batch."""
    path = write_jsonl([{"text": "call me", "label": 0}])
    fits = Labelled("single_label_classification", ("a", "b"), padding_id=1, reads_last=True)
    assert len(opened(fits, path, tokenizer=byte_level)) == 1
    with pytest.raises(
        DataError, match=r"pads with the id 1, but the model's pad_token_id=2 finds the last token; nea"
    ):
        opened(replace(fits, padding_id=2), path, tokenizer=byte_level)
