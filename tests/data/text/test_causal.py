"""`format: text`: from documents to samples, and what is said of texts that cannot be read."""

import itertools
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, collate, open_dataset
from megatron_ds.data.text.corpus import TokenStream
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import ConfigError, DataError

VOCAB_SIZE = 4096
END = 0


def encode(tokenizer_path, *documents):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    return [token for text in documents for token in (*tokenizer.encode(text, add_special_tokens=False), END)]


def open_text(tmp_path, tokenizer_path, *sources, seq_length=8, vocab_size=VOCAB_SIZE):
    sources = [str(source) for source in sources]
    return open_dataset("text", Causal(), sources, seq_length, vocab_size, tokenizer_path, str(tmp_path / "cache"))


def stream_of(dataset):
    """The tokens the samples cover, put together again; checks that consecutive samples share one token."""
    samples = [dataset.sample(index) for index in range(len(dataset))]
    for sample, following in itertools.pairwise(samples):
        assert sample["targets"][-1] == following["input_ids"][0]
    for sample in samples:
        np.testing.assert_array_equal(sample["input_ids"][1:], sample["targets"][:-1])
    return [samples[0]["input_ids"][0], *np.concatenate([sample["targets"] for sample in samples])]


def test_samples_of_the_shipped_book(tmp_path, tokenizer_path, valid_text):
    dataset = open_text(tmp_path, tokenizer_path, valid_text, seq_length=64)
    tokens = encode(tokenizer_path, valid_text.read_bytes().decode())
    assert len(dataset) == (len(tokens) - 1) // 64
    assert stream_of(dataset) == tokens[: len(dataset) * 64 + 1]
    assert dataset.describe() == f"{len(tokens):,} tokens, {len(dataset):,} samples of 64"
    assert dataset.columns == ("input_ids", "targets")
    assert dataset.target_length is None


def test_shipped_tokenizer_round_trips_the_whole_book(tokenizer_path, book, valid_text):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END
    for path in (book, valid_text):
        text = path.read_bytes().decode()
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_validation_text_is_not_in_the_training_text(book, valid_text):
    paragraphs = [part for part in valid_text.read_text().split("\n\n") if len(part) > 80]
    training = book.read_text()
    assert len(paragraphs) > 50
    assert not [part for part in paragraphs if part in training]


def test_every_kind_of_source_gives_the_same_documents(tmp_path, tokenizer_path, write_jsonl):
    documents = ["Call me Ishmael.\r\n", "Some years ago—never mind\n\n", "  how long\tprecisely  "]
    lines = write_jsonl([{"text": text, "id": n} for n, text in enumerate(documents)])
    directory = tmp_path / "texts"
    directory.mkdir()
    for number, text in enumerate(documents):
        (directory / f"{number}.txt").write_bytes(text.encode())
    (directory / "README.md").write_text("not data")
    (directory / ".hidden.txt").write_text("not data")
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(saved))
    for source in (lines, directory, saved):
        assert list(TextSource(str(source)).documents()) == documents
        dataset = open_text(tmp_path, tokenizer_path, source, seq_length=1)
        assert stream_of(dataset) == encode(tokenizer_path, *documents)


def test_sources_are_concatenated_in_the_order_given(tmp_path, tokenizer_path):
    texts = {}
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"The whale of chapter {name}.")
        texts[name] = tmp_path / f"{name}.txt"
    forward = open_text(tmp_path, tokenizer_path, texts["b"], texts["a"], seq_length=1)
    assert stream_of(forward) == encode(tokenizer_path, "The whale of chapter b.", "The whale of chapter a.")
    backward = open_text(tmp_path, tokenizer_path, texts["a"], texts["b"], seq_length=1)
    assert forward.fingerprint != backward.fingerprint
    assert forward.fingerprint != open_text(tmp_path, tokenizer_path, *texts.values(), seq_length=2).fingerprint


def test_empty_documents_and_blank_lines_leave_no_trace(tmp_path, tokenizer_path, write_jsonl):
    source = write_jsonl([{"text": "whale"}, {"text": ""}, b"  ", {"text": "ship"}])
    assert stream_of(open_text(tmp_path, tokenizer_path, source, seq_length=1)) == encode(
        tokenizer_path, "whale", "ship"
    )


def test_many_batches_give_what_one_does(tmp_path, tokenizer_path, write_jsonl, monkeypatch):
    rarest = AutoTokenizer.from_pretrained(tokenizer_path).decode([VOCAB_SIZE - 1])
    documents = [rarest, *(f"Chapter {n}, in which the whale is {'not ' * n}seen." for n in range(50))]
    tokens = encode(tokenizer_path, *documents)
    assert tokens[0] == VOCAB_SIZE - 1 > max(tokens[1:])  # the largest id is in the first batch alone
    monkeypatch.setattr("megatron_ds.data.text.token_cache._BATCH_CHARACTERS", 200)
    source = write_jsonl([{"text": text} for text in documents])
    assert stream_of(open_text(tmp_path, tokenizer_path, source, seq_length=1)) == tokens
    assert "gives ids up to 4095" in refused(tmp_path, tokenizer_path, source, vocab_size=VOCAB_SIZE - 1)


def test_stream_reads_across_parts_of_any_size():
    parts = [
        np.arange(0, 3, dtype="<u2"),
        np.empty(0, "<u2"),
        np.arange(3, 4, dtype="<u4"),
        np.arange(4, 9, dtype="<u2"),
    ]
    stream = TokenStream(parts)
    for start in range(10):
        for stop in range(start, 10):
            tokens = stream.read(start, stop)
            assert tokens.tolist() == list(range(start, stop))
            assert tokens.dtype == np.int64


def test_collate_of_text(tmp_path, tokenizer_path):
    (tmp_path / "a.txt").write_text("The whale, the whale! Up helm, up helm! Oh, all ye sweet powers of air")
    dataset = open_text(tmp_path, tokenizer_path, tmp_path / "a.txt", seq_length=4)
    batch = collate(dataset, np.array([1, -1, 0]))
    assert set(batch) == {"input_ids", "targets"}
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
    assert batch["input_ids"].tolist() == [
        dataset.sample(1)["input_ids"].tolist(),
        [0] * 4,
        dataset.sample(0)["input_ids"].tolist(),
    ]
    assert batch["targets"].tolist() == [
        dataset.sample(1)["targets"].tolist(),
        [-100] * 4,
        dataset.sample(0)["targets"].tolist(),
    ]


def refused(tmp_path, tokenizer_path, *sources, **options):
    with pytest.raises(DataError) as caught:
        open_text(tmp_path, tokenizer_path, *sources, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_little_text_is_refused_with_numbers(tmp_path, tokenizer_path):
    path = tmp_path / "a.txt"
    path.write_text("whale")
    tokens = len(encode(tokenizer_path, "whale"))
    message = refused(tmp_path, tokenizer_path, path, seq_length=tokens)
    assert message == (
        f"data: {path}: {tokens} tokens do not fill one sample of data.seq_length={tokens}, which takes {tokens + 1}; "
        f"lower data.seq_length to at most {tokens - 1} or add text"
    )
    assert len(open_text(tmp_path, tokenizer_path, path, seq_length=tokens - 1)) == 1
    path.write_text("")
    assert "0 tokens do not fill" in refused(tmp_path, tokenizer_path, path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "whale"', "not JSON"),
        (b'{"text": "wh\xffle"}', "not UTF-8 (invalid start byte at byte 12 of the line)"),
        (b'{"txt": "whale", "id": 1}', "no field 'text', only id, txt"),
        (b"{}", "no field 'text', only an empty object"),
        (b'{"text": 7}', "field 'text' holds int; it must hold a string"),
        (b'{"text": null}', "field 'text' holds NoneType"),
        (b'{"text": "wh\\ud800le"}', "field 'text' holds a lone surrogate at character 2"),
        (b'["whale"]', "holds a JSON list; each line must hold one object"),
    ],
)
def test_broken_json_line_is_named(tmp_path, tokenizer_path, write_jsonl, line, problem):
    source = write_jsonl([{"text": "ship"}, b"", line])
    assert f"data: {source}:3: {problem}" in refused(tmp_path, tokenizer_path, source)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path, tokenizer_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("ship\nwhale\nprécis\n".encode("latin-1"))
    message = refused(tmp_path, tokenizer_path, path)
    assert message.startswith(f"data: {path}:3: not UTF-8 (") and message.endswith("convert the file to UTF-8")


def test_sources_that_do_not_exist_are_refused_without_asking_the_hub(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for source in ("corpus.txt", "corpus.jsonl", "./corpus", "/no/such", "a/b/c", "~/nothing-here"):
        assert f"data: {source}: no such file or directory (looked in" in refused(tmp_path, tokenizer_path, source)


def test_hub_id_is_loaded_where_no_such_path_exists(tmp_path, tokenizer_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["whale", "ship"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = open_text(tmp_path, tokenizer_path, "melville/whales", seq_length=1)
    assert asked == [("melville/whales", "train")]
    assert stream_of(dataset) == encode(tokenizer_path, "whale", "ship")


def test_hub_failure_names_both_readings(tmp_path, tokenizer_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refused(tmp_path, tokenizer_path, "melville/whales")
    assert message == (
        f"data: melville/whales: neither a file or directory (looked in {Path.cwd()}) nor a hub dataset with a 'train' "
        "split that can be loaded (ConnectionError: no route)"
    )


def test_unfit_directories_and_tables_are_refused(tmp_path, tokenizer_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(tmp_path, tokenizer_path, empty)
    assert "the directory holds no .txt, .jsonl, .json, .ndjson, .csv, .tsv, .parquet, .arrow file" in message
    table = datasets.Dataset.from_dict({"content": ["whale"]})
    table.save_to_disk(str(tmp_path / "table"))
    message = refused(tmp_path, tokenizer_path, tmp_path / "table")
    assert "no column 'text', only content; rename_column" in message
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    message = refused(tmp_path, tokenizer_path, tmp_path / "splits")
    assert f"name one of them: {tmp_path}/splits/train or {tmp_path}/splits/test" in message
    datasets.Dataset.from_dict({"text": ["whale", None]}).save_to_disk(str(tmp_path / "null"))
    assert "row 1: column 'text' holds NoneType" in refused(tmp_path, tokenizer_path, tmp_path / "null")
    (tmp_path / "table" / "state.json").write_text("{")
    assert "the saved dataset cannot be read" in refused(tmp_path, tokenizer_path, tmp_path / "table")
    (tmp_path / "a.md").write_text("whale")
    assert "reads files that end in .txt, .jsonl, .json, .ndjson, .csv, .tsv, .parquet, .arrow, also compressed" in (
        message := refused(tmp_path, tokenizer_path, tmp_path / "a.md")
    )
    assert message.endswith("not in '.md'; rename or convert it")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer_path, valid_text):
    largest = max(encode(tokenizer_path, valid_text.read_bytes().decode()))
    message = refused(tmp_path, tokenizer_path, valid_text, vocab_size=largest)
    assert f"gives ids up to {largest}, but the model's vocab_size={largest} ends at {largest - 1}" in message
    assert open_text(tmp_path, tokenizer_path, valid_text, vocab_size=largest + 1)


def test_open_dataset_refuses_what_it_does_not_know(tmp_path, valid_text):
    with pytest.raises(
        ConfigError, match=re.escape("data.format=txt is not one of text, chat, tokenized, indexed, labelled")
    ):
        open_dataset("txt", Causal(), [str(valid_text)], 8, VOCAB_SIZE)
    with pytest.raises(DataError, match=re.escape("model.tokenizer is not set, but data.format=text needs it")):
        open_dataset("text", Causal(), [str(valid_text)], 8, VOCAB_SIZE)
    with pytest.raises(DataError, match="no sources; name at least one"):
        open_dataset("text", Causal(), [], 8, VOCAB_SIZE)
