"""Every form of file, directory and table gives the same rows to train, prepare and inspect."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, ChatOptions, open_dataset
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.inspect.facts import inspect_file
from megatron_ds.data.prepare import PrepareOptions, chunks, prepare
from megatron_ds.data.readers.source import Source
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError
from tests.data.readers.files import COMPRESSIONS, FORMS, every_file, json_lines

TEXTS = ['Call me "Ishmael".\r\nSome years ago—', "NA", "never mind, how; long\tprecisely \u2028", "whale 🐋", "0012"]
TEXT_ROWS = [{"text": text, "id": number, "meta": {"n": str(number)}} for number, text in enumerate(TEXTS)]
ID_ROWS = [{"input_ids": [n + 1, n + 2, n + 3], "labels": [-100, n + 2, n + 3]} for n in range(5)]
CHAT_ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text}], "id": n}
    for n, text in enumerate(("call me", "ishmael", "some years", "ago", "never mind"))
]
VOCAB_SIZE = 4096


@pytest.fixture(scope="module", params=sorted(every_file(TEXT_ROWS)))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    def write_(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return write_


@pytest.fixture
def open_(tmp_path: Path, tokenizer_path: str, chat_tokenizer: Any) -> Callable[..., Any]:
    """Open a source in a format, as a run does."""

    def open_format(format: str, *sources: str | Source, seq_length: int = 64) -> Any:
        tokenizer = chat_tokenizer("header") if format == "chat" else tokenizer_path
        options = ChatOptions() if format == "chat" else None
        cache = str(tmp_path / "cache")
        return open_dataset(format, Causal(), sources, seq_length, VOCAB_SIZE, tokenizer, cache, options=options)

    return open_format


def prepared(tokenizer_path: str, tmp_path: Path, *sources: str | Source, **options: Any) -> list[str]:
    """Return the documents that `prepare` writes."""
    prefix, tokenizer = str(tmp_path / "out/corpus"), AutoTokenizer.from_pretrained(tokenizer_path)
    prepare(PrepareOptions(sources, tokenizer_path, prefix, 2, bos=False, overwrite=True, **options))
    file = IndexedFile(prefix)
    return [tokenizer.decode(file.read(index)[:-1]) for index in range(len(file))]


def ids_of(dataset: Any) -> list[list[int]]:
    return [dataset.sample(index)["input_ids"][:3].tolist() for index in range(len(dataset))]


@pytest.mark.usefixtures("small_chunks")
def test_texts(name: str, write: Any, tokenizer_path: str, tmp_path: Path) -> None:
    source = write(name, every_file(TEXT_ROWS)[name])
    assert list(TextSource(source).documents()) == TEXTS
    assert prepared(tokenizer_path, tmp_path, source) == TEXTS
    facts = inspect_file(source, tokenizer_path, 9)
    assert facts.format == "text" and facts.lengths.count == 5
    shown = ["".join(piece.text for piece in one.documents[0].pieces) for one in facts.shown]
    assert shown == TEXTS


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 2)


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


# ---- many files ------------------------------------------------------------------------------------------------------


def write_tree(write: Any) -> None:
    for place, content in {
        "tree/b.txt": TEXTS[1].encode(),
        "tree/a/2.jsonl.gz": COMPRESSIONS[".gz"](json_lines(TEXT_ROWS[:1])),
        "tree/c/d/3.parquet": FORMS["a.parquet"](TEXT_ROWS[2:4]),
        "tree/c/4.JSON": FORMS["pretty.json"](TEXT_ROWS[4:]),
        "tree/.hidden.jsonl": b"hidden",
        "tree/.git/x.jsonl": b"hidden",
        "tree/a/README.md": b"a description",
        "tree/dataset_infos.json": b"[]",
    }.items():
        write(place, content)


ORDER = [TEXTS[0], TEXTS[1], TEXTS[4], TEXTS[2], TEXTS[3]]  # by path: a/2, b, c/4, c/d/3


@pytest.mark.parametrize("source", ["tree", "tree/**", "tree/**/*", "tree/*", "[t]ree"])
def test_directories_and_patterns_are_searched(
    source: str, write: Any, tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(write)
    assert list(TextSource(str(tmp_path / source)).documents()) == ORDER
    monkeypatch.chdir(tmp_path)
    assert list(TextSource(source).documents()) == ORDER
    assert prepared(tokenizer_path, tmp_path, source) == ORDER


def test_patterns_choose_files(write: Any, open_: Any, tmp_path: Path) -> None:
    for number, row in enumerate(ID_ROWS):
        write(f"ids/{number}.jsonl", json_lines([row]))
    dataset = open_("tokenized", str(tmp_path / "ids/[13]*"), str(tmp_path / "ids/{}.jsonl".format("?")))
    assert ids_of(dataset) == [ID_ROWS[n]["input_ids"] for n in (1, 3, 0, 1, 2, 3, 4)]
    literal = write("ids/[13].jsonl", json_lines(ID_ROWS[4:]))
    assert ids_of(open_("tokenized", literal)) == [ID_ROWS[4]["input_ids"]], "the name of a file is no pattern"
    with pytest.raises(DataError, match=r"ids/\*\.gz: no file of examples \(.*\) matches the pattern \(looked in"):
        open_("tokenized", str(tmp_path / "ids/*.gz"))


def test_links_that_lead_back_are_followed_once(write: Any, tmp_path: Path) -> None:
    write("tree/a.txt", b"whale")
    os.symlink(tmp_path / "tree", tmp_path / "tree/again")
    os.symlink(tmp_path / "tree/a.txt", tmp_path / "tree/b.txt")
    assert list(TextSource(str(tmp_path / "tree")).documents()) == ["whale", "whale"]


# ---- tables of `datasets` --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "split", "chosen"),
    [
        ("both", "train", [0, 1, 2, 3]),
        ("both", "train[:50%]", [0, 1]),
        ("both", "test+train[3:]", [4, 3]),
        ("both/train", "train[-1:]", [3]),
        ("both/train", None, [0, 1, 2, 3]),
        ("one", None, [0, 1, 2, 3, 4]),
        ("one", "train[1:3]", [1, 2]),
        ("only", None, [0, 1, 2]),
    ],
)
def test_splits_of_saved_data_sets(
    saved: str, split: str | None, chosen: list[int], open_: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    rows = [{"text": text, **ids} for text, ids in zip(TEXTS, ID_ROWS)]
    table = datasets.Dataset.from_list(rows)
    parts = {"train": table.select(range(4)), "test": table.select([4])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"validation": table.select(range(3))}).save_to_disk(str(tmp_path / "only"))
    table.save_to_disk(str(tmp_path / "one"))
    source = Source(str(tmp_path / saved), split=split)
    assert list(TextSource(source).documents()) == [TEXTS[n] for n in chosen]
    assert prepared(tokenizer_path, tmp_path, source) == [TEXTS[n] for n in chosen]
    ids = [ID_ROWS[n]["input_ids"] for n in chosen]
    assert ids_of(open_("tokenized", Source(source.path, split=split))) == ids


def test_splits_that_do_not_exist(write: Any, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(TEXT_ROWS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    for split, says in (
        ("tset", "split=tset names no rows"),
        ("train[:", "split=train[: names no rows"),
        (None, f"or write {{path: {tmp_path}/both, split: train}}"),
    ):
        with pytest.raises(DataError) as caught:
            TextSource(Source(str(tmp_path / "both"), split=split))
        assert says in str(caught.value) and "\n" not in str(caught.value)
    for field in ("split", "name"):
        with pytest.raises(DataError, match=f"{field}=train: a file has no {field}s; remove it"):
            TextSource(Source(write("a.txt", b"whale"), **{field: "train"}))


def test_a_directory_of_files_has_the_splits_that_datasets_finds(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    write("set/train.jsonl", json_lines(TEXT_ROWS[:3]))
    write("set/test.jsonl", json_lines(TEXT_ROWS[3:]))
    assert list(TextSource(str(tmp_path / "set")).documents()) == [*TEXTS[3:], *TEXTS[:3]]
    assert list(TextSource(Source(str(tmp_path / "set"), split="train[1:]")).documents()) == TEXTS[1:3]
    with pytest.raises(DataError, match="as datasets finds it, has a 'dev' split that can be loaded"):
        TextSource(Source(str(tmp_path / "set"), split="dev"))


def test_saved_data_sets_in_a_directory(write: Any, tmp_path: Path) -> None:
    """Each is one table; files of a cache that `map` has left there are no data."""
    datasets.Dataset.from_list(TEXT_ROWS[:2]).save_to_disk(str(tmp_path / "all/b"))
    write("all/b/cache-0123.arrow", FORMS["stream.arrow"](TEXT_ROWS[3:]))
    write("all/c.jsonl", json_lines(TEXT_ROWS[2:3]))
    for source in (tmp_path / "all", tmp_path / "all/*"):
        assert list(TextSource(str(source)).documents()) == TEXTS[:3]


def test_a_data_set_of_the_hub_has_a_configuration_and_a_split(open_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **given: Any) -> Any:
        asked.append((path, given))
        return datasets.Dataset.from_list(ID_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("melville/whales", "english", "train[:10%]")
    assert ids_of(open_("tokenized", source)) == [row["input_ids"] for row in ID_ROWS]
    assert asked == [("melville/whales", {"split": "train[:10%]", "name": "english"})]


@pytest.mark.parametrize("path", ["data/train.jsonl.gz", "train.parquet", "a/b.zst", "x.ndjson", "data/*.nothing"])
def test_paths_are_no_data_sets_of_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"no (such file or directory|file of examples .*) \(looked in"):
        TextSource(path)
    with pytest.raises(DataError, match="is an address, and only files and data sets on the hub are read; download"):
        TextSource("https://example.com/a.jsonl")


# ---- names of fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["a.jsonl", "pretty.json", "a.csv", "a.parquet", "stream.arrow", "saved"])
def test_fields_that_are_named_otherwise(
    form: str, write: Any, open_: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    """A field of our name is another field; the end of the field that is taken stands in the data's own name."""
    rows = [{"content": text, "text": "no", "ids": ids["input_ids"]} for text, ids in zip(TEXTS, ID_ROWS)]
    if form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        path = str(tmp_path / "saved")
    else:
        path = write(form, {**FORMS, "a.jsonl": json_lines}[form](rows))
    source = Source(path, columns=(("text", "content"),))
    assert list(TextSource(source).documents()) == TEXTS
    assert prepared(tokenizer_path, tmp_path, path, column="content") == TEXTS
    assert TextSource(source).digest() != TextSource(Source(path)).digest()
    renamed = open_("tokenized", Source(path, columns=(("input_ids", "ids"), ("labels", "ids"))))
    assert ids_of(renamed) == [row["input_ids"] for row in ID_ROWS]


@pytest.mark.parametrize("form", ["lines.jsonl", "a.parquet", "stream.arrow", "saved"])
def test_a_field_inside_of_another(form: str, write: Any, tokenizer_path: str, tmp_path: Path) -> None:
    rows = [{"meta": {"text": text}, "id": number} for number, text in enumerate(TEXTS)]
    if form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    path = str(tmp_path / "saved") if form == "saved" else write(form, FORMS[form](rows))
    assert list(TextSource(Source(path, columns=(("text", "meta.text"),))).documents()) == TEXTS
    assert prepared(tokenizer_path, tmp_path, path, column="meta.text") == TEXTS


def test_a_field_that_is_not_there_is_named_as_in_the_data(write: Any, tmp_path: Path) -> None:
    source = Source(write("a.jsonl", json_lines([{"text": "x"}])), columns=(("text", "content"),))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'content', only text; name"):
        list(TextSource(source).documents())


# ---- bad rows --------------------------------------------------------------------------------------------------------
