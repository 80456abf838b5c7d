"""`prepare`: every kind of source to Megatron's files, the same with any number of workers, gone on with when cut."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.prepare import Prepared, PrepareOptions, chunks, journal, prepare, workers
from megatron_ds.data.prepare import run as prepare_run
from megatron_ds.data.prepare.chunks import Reader, cut
from megatron_ds.errors import DataError, LaunchError
from tests.data import oracle
from tests.data.readers.files import every_file
from tests.forked_python import ForkedPython


@pytest.fixture
def made(tokenizer_path: str, tmp_path: Path) -> Callable[..., Prepared]:
    def make(*sources: str, name: str = "out/my.corpus", num_workers: int = 2, **options: Any) -> Prepared:
        return prepare(PrepareOptions(sources, tokenizer_path, f"{tmp_path}/{name}", num_workers, **options))

    return make


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, so that workers overtake one another and lines lie across their ends."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)


def texts(book: Path, count: int) -> list[str]:
    whole = book.read_text(encoding="utf-8")
    return [whole[start * 311 : start * 311 + 50 + start * 37 % 900] for start in range(1, count + 1)]


def decoded(prefix: Path, tokenizer_path: str) -> list[str]:
    """The documents, without the ends that are checked to be there."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    file = IndexedFile(str(prefix))
    documents = [file.read(index) for index in range(len(file))]
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def content(tmp_path: Path, name: str = "out/my.corpus") -> list[bytes]:
    return [Path(f"{tmp_path / name}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


@pytest.mark.usefixtures("small_chunks")
def test_json_lines(book: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path) -> None:
    """Megatron-core reads the ids that the tokenizer gives for each line; the manifest says what there is."""
    documents = texts(book, 60)
    lines: list[Any] = [{"text": text, "id": number} for number, text in enumerate(documents)]
    source = write_jsonl([b"", *lines[:20], b"  ", *lines[20:]])
    manifest = made(source).manifest
    assert decoded(tmp_path / "out/my.corpus", tokenizer_path) == documents
    sequences, lengths, bounds, kind = oracle.read(tmp_path / "out/my.corpus")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 0] for text in documents]
    assert [sequence.tolist() for sequence in sequences] == expected
    assert lengths.tolist() == [len(one) for one in expected] and bounds.tolist() == list(range(61))
    assert kind == np.uint16
    assert (manifest["num_documents"], manifest["num_tokens"]) == (60, sum(map(len, expected)))
    assert manifest["largest_id"] == max(map(max, expected)) and manifest["longest_document"] == max(map(len, expected))
    assert manifest["bad_lines"] == {"count": 0, "first": []} and set(manifest["xxh3_128"]) == {"bin", "idx"}
    assert json.loads((tmp_path / "out/my.corpus.json").read_text()) == manifest
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"my.corpus.bin", "my.corpus.idx", "my.corpus.json", ".my.corpus.lock"}


@pytest.mark.usefixtures("small_chunks")
def test_any_number_of_workers_writes_the_same(book: Path, write_jsonl: Any, made: Any, tmp_path: Path) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 40)])
    found = []
    for number in (1, 2, 5):
        made(source, name=f"by{number}/x", num_workers=number)
        found.append(content(tmp_path, f"by{number}/x"))
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("small_chunks")
def test_every_kind_of_source(
    book: Path, valid_text: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    documents = texts(book, 20)
    table = datasets.Dataset.from_dict({"text": documents[:7], "n": list(range(7))})
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_bytes(valid_text.read_bytes())
    (tmp_path / "folder" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[7:]))
    sources = [str(tmp_path / "saved"), str(tmp_path / "rows.parquet"), str(tmp_path / "folder")]
    made(*sources)
    whole = valid_text.read_bytes().decode()
    assert decoded(tmp_path / "out/my.corpus", tokenizer_path) == [
        *documents[:7],
        *documents[:7],
        *documents[7:],
        whole,
    ]


def test_another_column_and_no_end(
    book: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    source = write_jsonl([{"body": text} for text in texts(book, 3)])
    with pytest.raises(DataError, match=r"3 of 3 documents cannot be used, the first at .*data\.jsonl:1: no 'text'"):
        made(source)
    manifest = made(source, name="x", column="body", append_eod=False).manifest
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    assert manifest["num_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts(book, 3))
    assert manifest["end_id"] is None


BAD = [
    (b"{broken", "not JSON"),
    (b'"a string"', "holds a JSON str, not an object"),
    (b'{"id": 1}', "no 'text', only id"),
    (b'{"text": null}', "no 'text', it is null"),
    (b'{"text": 7}', "'text' holds int, not a string"),
    (b'{"text": ""}', "'text' is empty"),
    (b'{"text": "\xff\xfe"}', "not UTF-8 (invalid start byte at byte 10)"),
    (rb'{"text": "\ud800 half"}', "'text' holds a lone surrogate at character 0"),
]


@pytest.mark.usefixtures("small_chunks")
def test_bad_lines_are_counted_named_and_refused(
    book: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same again with `skip_bad` takes up what was done: nothing is tokenized a second time."""
    documents = texts(book, 40)
    lines: list[Any] = [{"text": text} for text in documents]
    for number, (line, _) in enumerate(BAD):
        lines.insert(5 * number + 3, line)
    source = write_jsonl(lines)
    with pytest.raises(DataError) as caught:
        made(source)
    assert str(caught.value).startswith(f"8 of 48 documents cannot be used, the first at {source}:4: not JSON")
    assert not (tmp_path / "out/my.corpus.bin").exists()
    monkeypatch.setattr(workers, "encode_texts", None)
    manifest = made(source, skip_bad=True).manifest
    assert decoded(tmp_path / "out/my.corpus", tokenizer_path) == documents
    assert manifest["bad_lines"]["count"] == 8
    for number, (place, (_, why)) in enumerate(zip(manifest["bad_lines"]["first"], BAD, strict=True)):
        assert place.startswith(f"{source}:{5 * number + 4}: {why}")


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_source_or_a_tokenizer_is_never_replaced(overwrite: bool, book: Path, made: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source, other = tmp_path / "out" / "corpus.json", tmp_path / "out" / "tokenizer.json"
    source.write_text(json.dumps([{"text": text} for text in texts(book, 4)]))
    other.write_text('{"version": "1.0", "model": {}}')
    (tmp_path / "out" / "link.json").symlink_to(source)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name, told in (
        ("out/corpus", "which is read"),
        ("out/link", "which is read"),
        ("out/tokenizer", "which is no manifest of data"),
    ):
        with pytest.raises(DataError, match=rf"would replace .*{name}\.json, {told}; choose another prefix$"):
            made(str(source), name=name, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_nothing_to_do_and_other_data_in_the_way(book: Path, write_jsonl: Any, made: Any, tmp_path: Path) -> None:
    rows = [{"text": text} for text in texts(book, 4)]
    source = write_jsonl(rows)
    first = made(source)
    before = content(tmp_path)
    again = made(source)
    assert again.unchanged and not first.unchanged and again.manifest == first.manifest
    other = write_jsonl(rows[:3], "other.jsonl")
    with pytest.raises(DataError, match=r"my\.corpus\.bin exists, with other data; choose another prefix"):
        made(other)
    assert content(tmp_path) == before
    made(other, overwrite=True)
    assert content(tmp_path) != before
    (tmp_path / "out/my.corpus.idx").unlink()
    with pytest.raises(DataError, match=r"my\.corpus\.bin exists, but .*my\.corpus\.idx does not; remove it, or give"):
        made(other)


@pytest.mark.usefixtures("small_chunks")
def test_what_is_done_is_gone_on_with(
    book: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    """Cut after each of the chunks in turn; and begun anew where the sources have changed."""
    source = write_jsonl([{"text": text} for text in texts(book, 12)])
    made(source, name="whole/x")
    total = len(cut([source]))
    add = journal.Journal.add
    for stop in range(total):
        seen = []

        def stopping(self: Any, *given: Any, stop: int = stop, seen: list[int] = seen) -> None:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(1)
            add(self, *given)

        name = f"cut{stop}/x"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal.Journal, "add", stopping)
            with pytest.raises(KeyboardInterrupt):
                made(source, name=name)
        told: list[str] = []
        prepare(PrepareOptions([source], tokenizer_path, str(tmp_path / name), 2), told.append)
        assert content(tmp_path, name) == content(tmp_path, "whole/x")
        assert bool(stop) == any(line.startswith("continuing after") for line in told)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["lines.jsonl.gz", "pretty.json"])
def test_files_that_are_read_from_start_to_end(
    name: str, book: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path
) -> None:
    """Any number of workers, and any interruption, gives what JSON lines give; each row is tokenized once."""
    rows = [{"text": text, "n": number} for number, text in enumerate(texts(book, 10))]
    made(write_jsonl(rows), name="lines/x")
    source = str(tmp_path / name)
    Path(source).write_bytes(every_file(rows)[name])
    add = journal.Journal.add
    for number, stop in ((1, 1), (3, 2)):
        seen: list[int] = []

        def stopping(self: Any, *given: Any, stop: int = stop, seen: list[int] = seen) -> None:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(1)
            add(self, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal.Journal, "add", stopping)
            with pytest.raises(KeyboardInterrupt):
                made(source, name=f"by{number}/x", num_workers=number)
        made(source, name=f"by{number}/x", num_workers=number)
        assert content(tmp_path, f"by{number}/x") == content(tmp_path, "lines/x")


def test_other_sources_start_over(book: Path, write_jsonl: Any, made: Any, tokenizer_path: str, tmp_path: Path) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 5)] + [b"bad"])
    with pytest.raises(DataError, match="1 of 6"):
        made(source)
    Path(source).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(book, 4)))
    told: list[str] = []
    prepare(PrepareOptions([source], tokenizer_path, str(tmp_path / "out/my.corpus"), 1), told.append)
    assert told == ["starting over: sources, tokenizer or options have changed"]
    assert decoded(tmp_path / "out/my.corpus", tokenizer_path) == texts(book, 4)


def test_a_crash_behind_the_journal_is_cut_off(book: Path, write_jsonl: Any, made: Any, tmp_path: Path) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 5)] + [b"bad"])
    with pytest.raises(DataError, match="1 of 6"):
        made(source)
    partial = tmp_path / "out" / ".my.corpus.partial"
    for name in ("tokens.bin", "lengths.bin"):
        with (partial / name).open("ab") as file:
            file.write(b"half a chunk")
    made(source, skip_bad=True)
    made(write_jsonl([{"text": text} for text in texts(book, 5)], "good.jsonl"), name="good")
    assert content(tmp_path) == content(tmp_path, "good")


def test_a_full_disk_is_one_line_and_loses_nothing(
    book: Path, write_jsonl: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 30)])
    made(source, name="whole/x")
    save, calls = journal.Journal.save, []

    def full(self: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self)

    monkeypatch.setattr(journal, "_EVERY_S", 0.0)
    monkeypatch.setattr(journal.Journal, "save", full)
    with pytest.raises(DataError, match="could not be written: No space left on device") as caught:
        made(source)
    assert "\n" not in str(caught.value) and "continues where it stopped" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    made(source)
    assert content(tmp_path) == content(tmp_path, "whole/x")


def test_a_worker_that_dies_does_not_hang(
    book: Path, write_jsonl: Any, made: Any, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 10)])

    def die(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "encode_chunk", die)
    with pytest.raises(LaunchError, match=r"prepare-\d ended with status -9"):
        made(source)
    monkeypatch.setattr(workers, "encode_chunk", lambda *given: 1 / 0)
    with pytest.raises(LaunchError, match=r"(?s)a worker failed at .*ZeroDivisionError"):
        made(source)


def test_a_worker_that_dies_while_it_sends_does_not_hang(
    book: Path, write_jsonl: Any, made: Any, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    """In the middle of a message: what the other worker sends is still read, and the end of this one seen."""
    source = write_jsonl([{"text": text} for text in texts(book, 10)])

    def send_much(*given: Any) -> workers.Encoded:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        return workers.Encoded(bytes(1 << 28), np.empty(0, dtype=np.int32), -1, 1, [])

    monkeypatch.setattr(workers, "encode_chunk", send_much)
    with pytest.raises(LaunchError, match=r"prepare-\d ended with status -14"):
        made(source)


def test_the_same_source_twice_is_two_sources(book: Path, write_jsonl: Any, made: Any, tmp_path: Path) -> None:
    rows = [{"text": text} for text in texts(book, 3)]
    source, bad = write_jsonl(rows), write_jsonl([rows[0], b"bad"], "bad.jsonl")
    made(source)
    with pytest.raises(DataError, match="with other data"):
        made(source, source)
    found = made(bad, bad, name="x", skip_bad=True).manifest
    assert [place.partition(": ")[0] for place in found["bad_lines"]["first"]] == [f"{bad}:2"] * 2
    assert found["num_documents"] == 2


def test_moved_sources_are_the_same(book: Path, write_jsonl: Any, made: Any, tmp_path: Path) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 3)])
    made(source)
    moved = Path(source).rename(tmp_path / "elsewhere.jsonl")
    assert made(str(moved)).unchanged


def test_cut_while_it_gets_its_names(
    book: Path, write_jsonl: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of the renames; also over data that were there."""
    source = write_jsonl([{"text": text} for text in texts(book, 3)])
    made(write_jsonl([{"text": "others"}], "others.jsonl"))
    made(source, name="whole/x")
    replace = os.replace
    for suffix in (".idx", ".json"):

        def cut_short(old: Any, new: Any, suffix: str = suffix) -> None:
            if str(new).endswith(f"my.corpus{suffix}"):
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            made(source, overwrite=True, restart=True)
        monkeypatch.setattr(os, "replace", replace)
        assert made(source).unchanged and content(tmp_path) == content(tmp_path, "whole/x")


def test_damaged_data_are_not_taken_for_whole(book: Path, write_jsonl: Any, made: Any, tmp_path: Path) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 3)])
    made(source)
    whole = content(tmp_path)
    (tmp_path / "out/my.corpus.bin").write_bytes(whole[0][:-2])
    with pytest.raises(DataError, match="exists, with other data"):
        made(source)
    made(source, overwrite=True)
    assert content(tmp_path) == whole


def test_names_in_errors_are_few_and_in_one_line(write_jsonl: Any, made: Any) -> None:
    for row in (b'{"a\\nb": 1}', rb'{"\ud800": 1}', json.dumps({f"k{number}": 1 for number in range(3000)}).encode()):
        with pytest.raises(DataError) as caught:
            made(write_jsonl([row]))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        str(caught.value).encode()


def test_mistakes(tmp_path: Path, write_jsonl: Any, made: Any, tokenizer_path: str, sentencepiece: str) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        made(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="nothing to read"):
        made(_empty(tmp_path))
    with pytest.raises(DataError, match="no documents"):
        made(write_jsonl([b"", b""]))
    with pytest.raises(DataError, match=r"no documents; all 1 rows are bad, the first at .*data\.jsonl:1: not JSON"):
        made(write_jsonl([b"{"]), skip_bad=True)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is not a readable parquet file"):
        made(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match=r"names a directory; give a name in it, such as .*/out/corpus"):
        made(write_jsonl([{"text": "x"}]), name="out/")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="could not be written: "):
        made(write_jsonl([{"text": "x"}]), name="file/x")


def _empty(tmp_path: Path) -> str:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    return str(tmp_path / "empty.jsonl")


def test_lines_across_the_ends_of_chunks_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every length of chunk, line ends on and beside the cuts; without a last line end too."""
    lines = [json.dumps({"text": "x" * size}) for size in (1, 30, 2, 2, 80, 5)]
    for ending in ("\n", ""):
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + ending)
        for size in range(1, 160):
            monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
            reader, found, numbers, before = Reader("text"), [], [], 0
            for chunk in cut([str(tmp_path / "a.jsonl")]):
                for document in reader.documents(chunk):
                    if document.text is not None:
                        found.append(document.text)
                        numbers.append(before + document.line)
                    else:
                        count = document.line
                before += count
            assert found == [json.loads(line)["text"] for line in lines] and numbers == list(range(6)), size


def _start(source: str, tokenizer: str, output: Path, *more: str) -> ForkedPython:
    words = ["prepare", source, "--tokenizer", tokenizer, "--output", output, "--workers", 2, *more]
    return ForkedPython(["-m", "megatron_ds", *words], Path.cwd(), os.environ)


def test_the_command_survives_being_killed(book: Path, write_jsonl: Any, tokenizer_path: str, tmp_path: Path) -> None:
    """kill -9 and Ctrl-C at some moments; in the end the files are those of a run that nobody cut."""
    source = write_jsonl([{"text": text} for text in texts(book, 3000) * 4])
    whole = _start(source, tokenizer_path, tmp_path / "whole")
    assert whole.wait(120) == 0, whole.communicate()
    for number, sent in enumerate((signal.SIGKILL, signal.SIGINT)):
        process = _start(source, tokenizer_path, tmp_path / "cut")
        deadline = time.monotonic() + 60
        while process.poll() is None and not psutil.Process(process.pid).children() and time.monotonic() < deadline:
            time.sleep(0.02)  # until its workers are there
        time.sleep(0.15 * (number + 1))
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.send_signal(sent)
        status = process.wait(30)
        assert status in ((-9, 0) if sent == signal.SIGKILL else (130, 0)), process.communicate()
        assert not psutil.wait_procs(children, timeout=10)[1]  # workers end with their parent
        if status == 130:
            assert "the same command continues where it stopped" in process.communicate()[1]
    last = _start(source, tokenizer_path, tmp_path / "cut")
    assert last.wait(120) == 0, last.communicate()
    assert content(tmp_path, "cut") == content(tmp_path, "whole")


def test_the_manifest_of_50_000_files_is_one(tmp_path: Path) -> None:
    """Else the same command would refuse to replace it."""
    source = {"name": "/data/crawl/part-0000000.parquet", "bytes": 2**31, "digest": "0" * 32, "kind": ["parquet", ""]}
    file = tmp_path / "crawl.json"
    file.write_text(json.dumps({"key": "", "format_version": 1, "sources": [source] * 50_000}, indent=2))
    assert prepare_run._is_manifest(file)


def test_the_command_tells_what_it_did(book: Path, write_jsonl: Any, tokenizer_path: str, tmp_path: Path) -> None:
    source = write_jsonl([{"text": text} for text in texts(book, 5)] + [b"bad"] * 13)
    failed = _start(source, tokenizer_path, tmp_path / "x")
    out, err = failed.communicate(timeout=120)
    assert failed.returncode == 2 and out == ""
    *places, more, error = err.splitlines()
    assert len(places) == 10 and places[0].startswith(f"{source}:6: not JSON") and more == "... and 3 more"
    assert error.startswith(f"error: 13 of 18 documents cannot be used, the first at {source}:6: not JSON")
    done = _start(source, tokenizer_path, tmp_path / "x", "--skip-bad")
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 0
    goes_on, last = out.splitlines()
    assert goes_on.startswith("continuing after 5 documents") and last.startswith(f"{tmp_path}/x: 5 documents, ")
