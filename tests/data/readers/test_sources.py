"""Directories, patterns, saved data sets with their splits, and data sets of the hub."""

import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_ds.data.readers.source import Source
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import ConfigError, DataError
from tests.data.readers.files import COMPRESSIONS, FORMS, json_lines
from tests.data.readers.rows import ID_ROWS, TEXT_ROWS, TEXTS, ids_of, prepared


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


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-0.jsonl", "data/test-0.jsonl"],
        ["train/0.jsonl", "validation/0.jsonl"],
        ["en_TRAIN.jsonl", "en_dev.jsonl"],
    ],
)
def test_a_directory_of_several_splits_is_not_read_whole(names: list[str], write: Any, tmp_path: Path) -> None:
    for name, row in zip(names, TEXT_ROWS):
        write(f"hub/{name}", json_lines([row]))
    with pytest.raises(DataError, match="hub: the directory holds files of several splits") as caught:
        TextSource(str(tmp_path / "hub"))
    first, second, both = re.findall(rf"{re.escape(str(tmp_path))}[^\s,]*\*", str(caught.value))
    assert sorted(texts for one in (first, second) for texts in TextSource(one).documents()) == sorted(TEXTS[:2])
    assert len(list(TextSource(first).documents())) == 1
    assert len(list(TextSource(both).documents())) == 2


def test_names_that_only_resemble_splits(write: Any, tmp_path: Path) -> None:
    for name, row in zip(["trainer.jsonl", "latest.jsonl", "train.jsonl"], TEXT_ROWS):
        write(f"plain/{name}", json_lines([row]))
    assert len(list(TextSource(str(tmp_path / "plain")).documents())) == 3


def test_links_that_lead_back_are_followed_once(write: Any, tmp_path: Path) -> None:
    write("tree/a.txt", b"whale")
    os.symlink(tmp_path / "tree", tmp_path / "tree/again")
    os.symlink(tmp_path / "tree/a.txt", tmp_path / "tree/b.txt")
    write("elsewhere/c.txt", b"ship")
    os.symlink(tmp_path / "elsewhere", tmp_path / "tree/d")
    assert list(TextSource(str(tmp_path / "tree")).documents()) == ["whale", "whale", "ship"]


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
    assert list(TextSource(str(tmp_path / "set/**")).documents()) == [*TEXTS[3:], *TEXTS[:3]]
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
    with pytest.raises(ConfigError, match=r"ftp://example\.com/a\.jsonl: ftp:// is not one of s3://"):
        TextSource("ftp://example.com/a.jsonl")


def test_a_path_that_does_not_exist_has_a_near_one(write: Any, tmp_path: Path) -> None:
    write("corpus/train.jsonl.gz", b"")
    write("corpus/test.jsonl", b"")
    for name, near in (("train.jsonl", "train.jsonl.gz"), ("trian.jsonl.gz", "train.jsonl.gz"), ("valid.jsonl", "")):
        with pytest.raises(DataError) as caught:
            TextSource(str(tmp_path / "corpus" / name))
        hint = f"; nearest: {tmp_path}/corpus/{near}" if near else ""
        assert str(caught.value).endswith(f"no such file or directory (looked in {Path.cwd()}){hint}")


@pytest.mark.parametrize("name", ["train.jsonl", "corpus"])
def test_a_link_to_nothing_is_called_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).symlink_to("gone")
    for path in (name, str(tmp_path / name)):
        with pytest.raises(DataError) as refused:
            TextSource(path)
        assert str(refused.value) == f"data: {path}: is a link to gone, which does not exist"
