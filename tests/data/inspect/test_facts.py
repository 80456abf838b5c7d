"""`inspect` on data: indexed files, files of text and conversations, and the data of a run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import xxhash

from megatron_ds.cli.inspect_data import MARKS, bars
from megatron_ds.cli.main import _run
from megatron_ds.config.yaml_text import format_yaml
from megatron_ds.data import GlobalBatches, load_tokenizer
from megatron_ds.data.indexed.files import write_index
from megatron_ds.data.inspect.histogram import length_histogram
from tests.training.tiny import MODEL

Told = Callable[..., str]
CHATS = [("call me?", "ishmael"), ("some years?", "ago"), ("never mind?", "how long precisely"), ("how?", "long")]
DOCUMENTS = ["call me ishmael", "some years ago", "", "never mind how long precisely " * 200]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """What the command says on stdout, or on stderr where it has another exit status than 0."""

    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        assert _run(["inspect", *map(str, arguments)]) == status, capsys.readouterr()
        said = capsys.readouterr()
        return said.err if status == 2 else said.out

    return run


@pytest.fixture
def chat_file(write_jsonl: Any) -> str:
    """1 to 4 turns of the same."""
    turns = [
        [{"role": "user", "content": said}, {"role": "assistant", "content": answer}] * (number + 1)
        for number, (said, answer) in enumerate(CHATS)
    ]
    return write_jsonl([{"messages": messages} for messages in turns], "chat.jsonl")


@pytest.fixture
def prefix(tmp_path: Path, byte_level: str) -> str:
    """DOCUMENTS, the last in two sequences, with what `prepare` would write beside them."""
    tokenizer = load_tokenizer(byte_level)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    np.asarray([one for ids in documents for one in ids], dtype="<u2").tofile(tmp_path / "my.corpus.bin")
    lengths = [*map(len, documents[:3]), 100, len(documents[3]) - 100]
    write_index(tmp_path / "my.corpus.idx", np.dtype("<u2"), lengths, [0, 1, 2, 3, 5])
    sums = {
        suffix: xxhash.xxh3_128((tmp_path / f"my.corpus.{suffix}").read_bytes()).hexdigest()
        for suffix in ("bin", "idx")
    }
    manifest = {
        "num_documents": 4,
        "num_tokens": sum(lengths),
        "largest_id": 699,
        "sources": [{"name": "speeches.jsonl", "bytes": 7}],
        "tokenizer": {"path": "gpt2", "sha256": "abc"},
        "bad_lines": {"count": 3, "first": []},
        "xxh3_128": sums,
    }
    (tmp_path / "my.corpus.json").write_text(json.dumps(manifest))
    return str(tmp_path / "my.corpus")


@pytest.fixture
def run_of(tmp_path: Path, chat_tokenizer: Any) -> Callable[..., Path]:
    """A run file; keyword arguments are entries of its data."""

    def make(**data: Any) -> Path:
        mapping = {
            "model": {"config": {**MODEL, "vocab_size": 4096}, "tokenizer": chat_tokenizer("header")},
            "parallel": {"tensor": 2},
            "deepspeed": {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
            "data": {"seq_length": 128, "cache_dir": str(tmp_path / "cache"), **data},
            "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 1},
            "output": str(tmp_path / "out"),
        }
        path = tmp_path / "run.yaml"
        path.write_text(format_yaml(mapping))
        return path

    return make


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_every_length_is_in_one_bar_and_bars_are_few() -> None:
    chance = np.random.default_rng(0)
    for _ in range(300):
        low = int(chance.integers(0, 3000))
        high = low + int(chance.integers(0, 10 ** int(chance.integers(1, 6))))
        lengths = chance.integers(low, high + 1, int(chance.integers(1, 50)))
        found = length_histogram("documents", lengths)
        assert (found.shortest, found.longest, found.count) == (lengths.min(), lengths.max(), len(lengths))
        assert found.median == np.median(lengths) and found.total == lengths.sum()
        assert len(found.bars) <= 10 or found.longest > 16 * max(found.shortest, 1)
        assert len(found.bars) <= 20
        for bar, after in zip(found.bars, found.bars[1:]):
            assert after.first == bar.last + 1
        for bar in found.bars:
            assert bar.count == ((lengths >= bar.first) & (lengths <= bar.last)).sum()
        assert sum(bar.count for bar in found.bars) == len(lengths)
        assert found.bars[0].count and found.bars[-1].count, "none is empty at an end"


def test_bars_are_drawn_to_scale_and_none_is_lost() -> None:
    lengths = np.repeat([1, 2, 3], [1000, 500, 1])
    assert list(bars(length_histogram("documents", lengths))) == [
        "1 - 1  ██████████████████████████████  1,000   66.6%",
        "2 - 2  ███████████████                   500   33.3%",
        "3 - 3  ▏                                   1    0.1%",
    ]


def test_the_part_of_the_tokens_in_long_documents() -> None:
    found = length_histogram("documents", np.asarray([1000, 4095, 4096, 20_000]))
    assert found.long == ((4096, 24_096 / 29_191), (16_384, 20_000 / 29_191))
    assert length_histogram("documents", np.asarray([7, 4095])).long == ()


# ---- indexed files ---------------------------------------------------------------------------------------------------


def test_indexed_files(prefix: str, byte_level: str, told: Told) -> None:
    said = told(prefix, "--tokenizer", byte_level, "--samples", 2)
    for line in (
        f"prefix      {prefix}",
        "documents   4 in 5 sequences",
        "source      speeches.jsonl",
        "tokenizer   gpt2",
        "largest id  699",
        "bad lines   3 skipped",
        "intact      all checksums match",
    ):
        assert line in said.splitlines()
    facts = json.loads(told(prefix, "--json"))
    assert (facts["documents"], facts["sequences"], facts["dtype"], facts["checked"]) == (4, 5, "uint16", True)
    assert facts["tokens_bytes"] == 2 * facts["tokens"] and facts["lengths"]["shortest"] == 0
    assert f"tokens      {facts['tokens']:,} (" in said and "), uint16" in said
    shown = re.findall(r"^document (\d): [\d,]+ tokens\n  │ (.*)$", said, re.MULTILINE)
    assert shown == [("0", DOCUMENTS[0]), ("1", DOCUMENTS[1])]
    assert told(f"{prefix}.bin", "--json") == told(f"{prefix}.idx", "--json") == told(prefix, "--json")
    whole = told(prefix, "--tokenizer", byte_level, "--samples", 9)
    assert f"... and {facts['lengths']['longest'] - 512:,} more tokens" in whole, "a document of many is cut"


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_damage_is_seen_by_the_checksum(prefix: str, suffix: str, told: Told) -> None:
    path = Path(f"{prefix}.{suffix}")
    content = bytearray(path.read_bytes())
    if suffix == "bin":
        content[-2] ^= 1
    else:
        content[-16] ^= 1  # where the last document begins
    path.write_bytes(content)
    said = told(prefix, status=1)
    assert (
        f"DAMAGED     {path} has the checksum {xxhash.xxh3_128(bytes(content)).hexdigest()}, but {prefix}.json" in said
    )
    assert "intact" not in said
    assert "intact      by file lengths (--fast)" in told(prefix, "--fast")


def test_a_manifest_of_other_files(prefix: str, told: Told) -> None:
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**manifest, "num_tokens": 1}))
    assert re.search(r"DAMAGED +\S+ says num_tokens=1, but there are \d+", told(prefix, "--fast", status=1))
    Path(f"{prefix}.json").write_text('{"text": "no manifest"}')
    assert "manifest    none; the files cannot be verified" in told(prefix)


def test_what_indexed_files_are_refused_for(prefix: str, tokenizer_path: str, told: Told, tmp_path: Path) -> None:
    tokens = np.fromfile(f"{prefix}.bin", dtype="<u2")
    tokens[0] = 60_000
    tokens.tofile(f"{prefix}.bin")
    said = told(prefix, "--tokenizer", tokenizer_path, "--fast", status=2)
    assert said.startswith("error: data: ") and "holds the id 60000, but the tokenizer " in said
    assert said.count("\n") == 1
    Path(f"{prefix}.bin").unlink()
    assert "no such file" in told(prefix, status=2)
    assert "does not exist (looked in" in told(tmp_path / "nowhere", status=2)
    assert "only values of a run file can be overridden" in told(prefix, "data.packing=true", status=2)
    assert "--tokenizer works with indexed data and text files only" in told(
        tmp_path, "--tokenizer", tokenizer_path, status=2
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def test_conversations_in_a_file(chat_file: str, chat_tokenizer: Any, told: Told) -> None:
    said = told(chat_file, "--tokenizer", chat_tokenizer("header"), "--samples", 2)
    facts = json.loads(told(chat_file, "--tokenizer", chat_tokenizer("header"), "--json", "--samples", 4))
    total, learned = facts["lengths"]["total"], facts["learned"]
    assert facts["lengths"]["count"] == 4 and len(facts["shown"]) == 4
    assert f"chat        4 conversations, {total} tokens, {learned} of them with loss ({learned / total:.1%})" in said
    marked = re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", said, re.DOTALL)
    assert marked == ["ishmael<|eot|>", "ago<|eot|>", "ago<|eot|>"]
    assert learned == sum(one["documents"][0]["learned"] for one in facts["shown"])
    assert said.count("conversation ") == 2


def test_what_a_template_does_not_show(write_jsonl: Any, run_of: Any, chat_tokenizer: Any, told: Told) -> None:
    messages = [{"role": "user", "content": "call"}, {"role": "assistant", "content": "me", "reasoning_content": "ago"}]
    path = write_jsonl([{"messages": messages, "tools": [{"name": "look"}]}, {"messages": messages}])
    notes = [
        "tools: given in 1 conversation, not shown by the chat template",
        "reasoning_content: given in 2 conversations, not shown by the chat template",
    ]
    said = told(path, "--tokenizer", chat_tokenizer("header"))
    assert all(f"note        {note}\n" in said for note in notes)
    assert json.loads(told(path, "--tokenizer", chat_tokenizer("header"), "--json"))["notes"] == notes
    for _ in range(2):  # the second time from the cache
        run = json.loads(told(run_of(format="chat", train=[path]), "--json"))
        assert run["training"].endswith("; ".join(["", *notes]))


def test_text_in_a_file(write_jsonl: Any, byte_level: str, told: Told) -> None:
    path = write_jsonl([{"text": text} for text in DOCUMENTS])
    said = told(path, "--tokenizer", byte_level)
    assert "text        4 documents, " in said and "with loss" not in said and MARKS[0] not in said
    assert f"document 0: 4 tokens\n  │ {DOCUMENTS[0]}" in re.sub(r"\b\d+ tokens", "4 tokens", said)
    Path(path).with_suffix(".txt").write_text("call me ishmael\x1b[31m\x07\r\nsome\tyears")
    shown = told(Path(path).with_suffix(".txt"), "--tokenizer", byte_level)
    assert "│ call me ishmael␛[31m␇␍\n  │ some\tyears" in shown, "nothing reaches into the terminal"


def test_patterns_and_saved_tables(chat_file: str, chat_tokenizer: Any, told: Told, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(chat_file).read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "chat.*", tmp_path / "saved"):
        facts = json.loads(told(source, "--tokenizer", chat_tokenizer("header"), "--json"))
        assert (facts["format"], facts["lengths"]["count"], facts["num_bad_rows"]) == ("chat", 4, 0)
    assert "no file of examples" in told(tmp_path / "x*", "--tokenizer", chat_tokenizer("header"), status=2)


def test_bad_rows_of_a_file_are_left_out(write_jsonl: Any, chat_file: str, chat_tokenizer: Any, told: Told) -> None:
    rows = [json.loads(line) for line in Path(chat_file).read_text().splitlines()]
    for good, kind in (([{"text": text} for text in DOCUMENTS[:2]], "text"), (rows, "chat")):
        path = write_jsonl([b"{cut", *good, {"text": 7}])
        said = told(path, "--tokenizer", chat_tokenizer("header"), "--skip-bad")
        assert (
            f"bad rows    2 left out:\n            {path}:1: not JSON (" in said
            and f"{kind}        {len(good)} " in said
        )
        assert f"{path}:{len(good) + 2}: " in said
        assert f"{path}:1: not JSON" in told(path, "--tokenizer", chat_tokenizer("header"), status=2)
    assert "for a run file, add data.bad_rows=skip" in told(write_jsonl([], "run.yaml"), "--skip-bad", status=2)


def test_what_files_are_refused_for(
    write_jsonl: Any, byte_level: str, chat_file: str, chat_tokenizer: Any, told: Told
) -> None:
    assert "add --tokenizer DIR" in told(chat_file, status=2)
    for rows, says in (
        ([{"input_ids": [1]}], ":1: neither text nor messages nor prompt and completion, only input_ids; inspect the"),
        ([b"{"], ":1: not JSON"),
        ([b""], "no rows; each line must hold one object"),
        ([{"text": "fine"}, {"text": 7}], ":2: field 'text' holds int"),
    ):
        said = told(write_jsonl(rows), "--tokenizer", byte_level, status=2)
        assert says in said and said.startswith("error: ") and said.count("\n") == 1
    bad = write_jsonl([{"messages": [{"role": "user", "content": "x"}]}])
    assert ":1: no message of the assistant" in told(bad, "--tokenizer", chat_tokenizer("header"), status=2)
    assert "has no chat template" in told(chat_file, "--tokenizer", byte_level, status=2)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_shows_the_samples_that_it_takes_first(chat_file: str, run_of: Any, told: Told) -> None:
    run = run_of(format="chat", train=[chat_file], valid=[chat_file])
    facts = json.loads(told(run, "--json", "--samples", 6))
    order = GlobalBatches(4, 2, 1234, shuffle=True)
    expected = [*order.indices(0).tolist(), *order.indices(1).tolist()]
    assert [one["index"] for one in facts["shown"]] == expected and sorted(expected) == [0, 1, 2, 3]
    for one in facts["shown"]:
        (document,) = one["documents"]
        answers = [piece["text"] for piece in document["pieces"] if piece["learned"]]
        assert answers == [f"{CHATS[one['index']][1]}<|eot|>"] * (one["index"] + 1)
        assert one["padding"] == 128 - document["tokens"]
    learned = sum(one["documents"][0]["learned"] for one in facts["shown"])
    assert facts["learned"] == learned / 4 and facts["looked_at"] == facts["samples"] == 4
    said = told(run, "--samples", 1)
    assert "order       shuffled; 3 steps of 2 read 1.50 times 4 samples" in said
    assert f"loss        on {learned / 4:.1f} of a sample's 128 positions ({learned / 4 / 128:.1%})" in said
    assert "lengths     of conversations: " in said and "valid       4 conversations" in said
    assert not (run.parent / "out").exists(), "nothing is trained"


def test_packed_conversations_are_told_apart(chat_file: str, run_of: Any, told: Told) -> None:
    run = run_of(format="chat", train=[chat_file])
    said = told(run, "data.packing=true", "data.seq_length=512", "data.shuffle=false")
    assert "columns     input_ids, targets, position_ids" in said and "valid       none" in said
    assert re.search(r"^sample 0: \d+ tokens in 4 documents, \d+ with loss, \d+ positions of padding$", said, re.M)
    assert said.count("  document ") == 4
    marked = re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", said, re.DOTALL)
    assert marked == [f"{answer}<|eot|>" for number, (_, answer) in enumerate(CHATS) for _ in range(number + 1)]


def test_a_terminal_has_colours_and_no_marks(
    chat_file: str, run_of: Any, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = told(run_of(format="chat", train=[chat_file], shuffle=False), "--samples", 1)
    assert "\x1b[1;32mishmael<|eot|>\x1b[0m" in said and MARKS[0] not in said
    assert "\x1b[2m" in said


def test_other_formats(prefix: str, run_of: Any, told: Told, write_jsonl: Any) -> None:
    rows = [{"input_ids": [7] * (number + 2), "labels": [-100] * (number + 1) + [9]} for number in range(3)]
    run = run_of(format="tokenized", train=[write_jsonl(rows)], shuffle=False)
    said = told(run, "--samples", 1)
    assert "lengths     of examples: 2 to 4 tokens, median 3, mean 3.0" in said
    facts = json.loads(told(run_of(format="indexed", train=[prefix], seq_length=16), "--json", "--samples", 1))
    assert facts["format"] == "indexed" and facts["learned"] == 16 and facts["shown"][0]["documents"][0]["tokens"] == 17
    blend = [{"path": prefix, "weight": 0.5}, {"path": prefix, "weight": 0.5}]
    assert "data        indexed: blend of 0.500 " in told(run_of(format="indexed", train=blend, seq_length=16))


def test_what_a_run_is_refused_for(chat_file: str, run_of: Any, told: Told, byte_level: str) -> None:
    run = run_of(format="chat", train=[chat_file])
    for arguments, says in (
        (["data.seq_length=16"], "conversations have more tokens than data.seq_length=16"),
        (["data.sq_length=16"], "unknown key"),
        (["--tokenizer", byte_level], "a run names its own: model.tokenizer=DIR"),
        (["data.train=[nowhere.jsonl]"], "no such file"),
    ):
        said = told(run, *arguments, status=2)
        assert says in said and said.startswith("error: ") and said.count("\n") == 1


def test_bad_rows_of_a_run_are_named(write_jsonl: Any, chat_file: str, run_of: Any, told: Told) -> None:
    """Those of its blend and of its validation; fields are named in the run file."""
    rows = [json.loads(line) for line in Path(chat_file).read_text().splitlines()]
    path = write_jsonl([{"dialog": rows[0]["messages"]}, b"{cut", {"dialog": []}, {"dialog": rows[1]["messages"]}])
    blend = [{"path": path, "weight": 1, "column": "dialog"}, {"path": chat_file, "weight": 1}]
    run = run_of(format="chat", train=blend, valid=[{"path": path, "column": "dialog"}], bad_rows="drop")
    facts = json.loads(told(run, "--json"))
    assert facts["num_bad_rows"] == 4 and facts["bad_rows"][0].startswith(f"{path}:2: not JSON (")
    assert [one.split(": ")[0] for one in facts["bad_rows"]] == [f"{path}:2", f"{path}:3"] * 2
    said = told(run)
    assert "bad rows    4 left out:" in said and f"            {facts['bad_rows'][1]}" in said
    assert "(2 bad rows left out)" in facts["validation"]
    assert f"{path}:2: not JSON (" in told(run, "data.bad_rows=refuse", status=2)
    facts = json.loads(told(run_of(format="chat", train=[chat_file]), "--json"))
    assert facts["num_bad_rows"] == 0 and facts["bad_rows"] == []
