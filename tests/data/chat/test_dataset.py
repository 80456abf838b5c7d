"""`format: chat`: samples, what is dropped or cut, packs, the cache, and what is said of it all."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, ChatOptions, Masked, open_dataset
from megatron_ds.data.chat import tokens
from megatron_ds.data.chat.dataset import ChatDataset
from megatron_ds.errors import DataError

VOCAB_SIZE = 4096
WORDS = "call me ishmael some years ago never mind how long precisely having little or no".split()  # noqa: SIM905


def chats(count: int) -> list[dict[str, Any]]:
    """Of 1 to 3 turns, of many lengths, all different."""
    rows = []
    for row in range(count):
        messages = []
        for turn in range(1 + row % 3):
            said = " ".join(WORDS[: 1 + (row * 7 + turn * 3) % 15])
            messages += [
                {"role": "user", "content": f"{row} {said}?"},
                {"role": "assistant", "content": f"{said} {turn} {row}."},
            ]
        rows.append({"messages": messages, "id": row})
    return rows


@pytest.fixture
def open_chat(chat_tokenizer: Any, tmp_path: Path) -> Callable[..., ChatDataset]:
    def open_(*sources: str, seq_length: int = 256, template: str = "header", **options: Any) -> ChatDataset:
        path, cache = chat_tokenizer(template), str(tmp_path / "cache")
        chat = ChatOptions(**options)
        found = open_dataset("chat", Causal(), sources, seq_length, VOCAB_SIZE, path, cache, options=chat)
        assert isinstance(found, ChatDataset)
        return found

    return open_


def documents(dataset: ChatDataset, index: int) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each document of a packed sample."""
    sample = dataset.sample(index)
    bounds = [*np.flatnonzero(sample["position_ids"] == 0).tolist(), dataset.seq_length]
    return [
        (sample["input_ids"][start:stop].tolist(), sample["targets"][start:stop].tolist())
        for start, stop in itertools.pairwise(bounds)
    ]


def test_one_conversation_a_sample(write_jsonl: Any, open_chat: Any, chat_tokenizer: Any) -> None:
    dataset = open_chat(write_jsonl(chats(5)))
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer("header"))
    assert len(dataset) == 5 and dataset.columns == ("input_ids", "targets") and not dataset.ordered
    for index, row in enumerate(chats(5)):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        sample = dataset.sample(index)
        assert sample["input_ids"].tolist() == ids + [0] * (256 - len(ids))
        targets = sample["targets"]
        at = np.flatnonzero(targets != -100)
        assert (targets[at] == sample["input_ids"][at + 1]).all() and at.max() < len(ids) - 1
        said = "".join(f"{message['content']}<|eot|>" for message in row["messages"][1::2])
        assert tokenizer.decode(targets[at]) == said
    assert all((dataset.sample(index + 5)["targets"] == dataset.sample(index)["targets"]).all() for index in range(5))
    assert set(dataset.blank()) == {"input_ids", "targets"} and (dataset.blank()["targets"] == -100).all()


def test_packed_samples_hold_the_same_conversations(write_jsonl: Any, open_chat: Any) -> None:
    """To the token, with the same targets, each once; what is left over is a document without loss."""
    source = write_jsonl(chats(60))
    plain, packed = open_chat(source), open_chat(source, packing=True)
    assert packed.columns == ("input_ids", "targets", "position_ids") and len(packed) < len(plain)
    alone = {}
    for index in range(len(plain)):
        length = plain.lengths[index]
        sample = plain.sample(index)
        alone[tuple(sample["input_ids"][:length].tolist())] = sample["targets"][:length].tolist()
    seen = 0
    for index in range(len(packed)):
        for ids, targets in documents(packed, index):
            if set(ids) == {0}:
                assert set(targets) == {-100}
                continue
            assert alone[tuple(ids)] == targets and targets[-1] == -100
            seen += 1
    assert seen == len(plain) == packed.num_conversations == 60
    assert packed.fingerprint != plain.fingerprint
    assert packed.blank()["position_ids"].tolist() == list(range(256))


def test_overlong_conversations(write_jsonl: Any, open_chat: Any, tmp_path: Path) -> None:
    source = write_jsonl(chats(30))
    lengths = open_chat(source).lengths
    limit = int(np.median(lengths))
    over = int((lengths > limit).sum())
    first = int(np.flatnonzero(lengths > limit)[0]) + 1
    with pytest.raises(DataError) as caught:
        open_chat(source, seq_length=limit)
    assert str(caught.value) == (
        f"data: {over} of 30 conversations have more tokens than data.seq_length={limit}, the longest {lengths.max()}, "
        f"the first at {tmp_path}/data.jsonl:{first}; set data.overlong=drop or cut, or data.seq_length={lengths.max()}"
    )
    dropped = open_chat(source, seq_length=limit, overlong="drop")
    assert (
        dropped.num_conversations == 30 - over and f"({over} of more than {limit} tokens dropped)" in dropped.describe()
    )
    cut = open_chat(source, seq_length=limit, overlong="cut")
    assert cut.num_conversations == 30 and f"({over} cut to {limit} tokens)" in cut.describe()
    whole = open_chat(source)
    for index in range(30):
        ids, learned = cut.conversation(index)
        assert ids.tolist() == whole.conversation(index)[0][:limit].tolist() and len(learned) == len(ids)
        assert cut.sample(index)["targets"][-1] == -100 or len(ids) < limit
    short = open_chat(source, seq_length=30, overlong="cut")  # of many, not one learned token is left
    assert 0 < short.num_conversations < 30
    assert all((short.sample(index)["targets"] != -100).any() for index in range(len(short)))
    with pytest.raises(DataError, match=r"none of 30 conversations is left of data\.seq_length=4; raise it to"):
        open_chat(source, seq_length=4, overlong="drop")
    assert len({one.fingerprint for one in (whole, dropped, cut, short)}) == 4


def test_what_is_said(write_jsonl: Any, open_chat: Any) -> None:
    dataset = open_chat(write_jsonl(chats(20)), packing=True)
    tokens_, learned = int(dataset.lengths.sum()), sum(int(dataset.conversation(i)[1].sum()) for i in range(20))
    assert dataset.describe() == (
        f"20 conversations, {len(dataset)} samples of 256: {tokens_ / len(dataset) / 256:.1%} filled, "
        f"{learned / tokens_:.1%} of {tokens_:,} tokens under loss"
    )


def test_sources_of_every_kind_are_one_dataset(write_jsonl: Any, open_chat: Any, tmp_path: Path) -> None:
    rows = chats(9)
    for row in rows:
        row["messages"][0]["name"] = None  # what tables fill up with
    first = write_jsonl(rows[:3], "a.jsonl")
    datasets.Dataset.from_list(rows[3:6]).save_to_disk(str(tmp_path / "table"))
    (tmp_path / "folder").mkdir()
    for name, row in zip("xyz", rows[6:]):
        (tmp_path / "folder" / f"{name}.jsonl").write_text(json.dumps(row))
    run_on_all_ranks = open_chat(first, str(tmp_path / "table"), str(tmp_path / "folder"))
    whole = open_chat(write_jsonl(chats(9), "whole.jsonl"))
    assert len(run_on_all_ranks) == 9
    for index in range(9):
        assert run_on_all_ranks.sample(index)["targets"].tolist() == whole.sample(index)["targets"].tolist()


def test_the_cache_goes_by_content(
    write_jsonl: Any, open_chat: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = open_chat(write_jsonl(chats(4)))
    again = open_chat(write_jsonl(chats(4), "moved.jsonl"))
    with pytest.raises(DataError, match=r"the first at .*/moved\.jsonl:2;"):
        open_chat(write_jsonl(chats(4), "moved.jsonl"), seq_length=100)
    assert again.fingerprint == first.fingerprint and len(list((tmp_path / "cache").glob("*.chat"))) == 1
    monkeypatch.setattr(tokens, "_make", None)  # nothing may be made again
    assert open_chat(write_jsonl(chats(4))).fingerprint == first.fingerprint
    monkeypatch.undo()
    others = [
        open_chat(write_jsonl(chats(5))),
        open_chat(write_jsonl(chats(4)), loss_turns="last"),
        open_chat(write_jsonl(chats(4)), template="qwen3"),
        open_chat(write_jsonl(chats(4)), seq_length=255),
    ]
    assert len({one.fingerprint for one in (first, *others)}) == 5
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_mistakes_name_file_and_line(write_jsonl: Any, open_chat: Any, tmp_path: Path) -> None:
    source = write_jsonl([*chats(2), {"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(DataError, match=r"data\.jsonl:3: no message of the assistant"):
        open_chat(source)
    with pytest.raises(DataError, match="no conversations; each line or row must hold one"):
        open_chat(write_jsonl([]))
    assert not list((tmp_path / "cache").glob("*.chat"))


def test_other_models_and_small_vocabularies_are_refused(write_jsonl: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    source, path = write_jsonl(chats(2)), chat_tokenizer("header")
    with pytest.raises(DataError, match="is for causal models"):
        open_dataset("chat", Masked(seed=0), [source], 64, VOCAB_SIZE, path, str(tmp_path / "cache"))
    with pytest.raises(DataError, match="vocab_size=100 ends at 99"):
        open_dataset("chat", Causal(), [source], 64, 100, path, str(tmp_path / "cache"))


def test_loss_on_every_token(write_jsonl: Any, open_chat: Any) -> None:
    rows = chats(4)
    rows[0]["messages"][1]["weight"] = 0
    rows[0]["messages"] += rows[1]["messages"]
    source = write_jsonl(rows)
    plain, everything = open_chat(source), open_chat(source, loss_on="all")
    for index in range(4):
        ids, learned = everything.conversation(index)
        assert (ids == plain.conversation(index)[0]).all()
        off = int((~learned).sum())
        targets = everything.sample(index)["targets"]
        assert (off == 0) == (index > 0) and int((targets != -100).sum()) == len(ids) - 1 - off
    assert everything.fingerprint != plain.fingerprint


def test_notes_are_cached_with_the_tokens(write_jsonl: Any, open_chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over all sources, and the same from the cache."""
    rows = chats(6)
    for row in rows[:4]:
        row["tools"] = [{"name": "look", "description": "Look.", "parameters": {}}]
        row["messages"][1]["reasoning_content"] = "Hm."
    sources = write_jsonl(rows[:3]), write_jsonl(rows[3:], "more.jsonl")
    expected = [
        "tools: given in 4 conversations, not shown by the chat template",
        "reasoning_content: given in 4 conversations, not shown by the chat template",
    ]
    dataset = open_chat(*sources)
    assert dataset.notes == expected and dataset.describe().endswith("; ".join(["tokens under loss", *expected]))
    monkeypatch.setattr(tokens, "_make", None)
    assert open_chat(*sources).notes == expected
    assert open_chat(*sources).fingerprint == dataset.fingerprint


def test_the_date_is_that_of_the_run_file(write_jsonl: Any, open_chat: Any, chat_tokenizer: Any) -> None:
    source = write_jsonl(chats(2))
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer("dated"))
    default, other = open_chat(source, template="dated"), open_chat(source, template="dated", date="2025-01-02")
    for dataset, date, shown in ((default, "2024-07-26", "26 Jul 2024"), (other, "2025-01-02", "02 Jan 2025")):
        assert shown in tokenizer.decode(dataset.conversation(0)[0])
        assert dataset.notes == [f"the chat template writes the date {date} (data.date)"]
    assert default.fingerprint != other.fingerprint
    same = [open_chat(source, date=date) for date in ("2024-07-26", "2025-01-02")]
    assert same[0].fingerprint == same[1].fingerprint and same[0].notes == []


def test_calls_in_a_table(open_chat: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    """In a table, the arguments of each call have the keys of all calls; those of others are not written."""
    calls = [{"name": "look", "arguments": {"at": "x"}}, {"name": "wait", "arguments": {"days": 3}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
            ]
        }
        for call in calls
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "table"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "table.parquet"))
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer("qwen3"))
    for source in ("table", "table.parquet"):
        dataset = open_chat(str(tmp_path / source), template="qwen3")
        for index, call in enumerate(calls):
            ids, learned = dataset.conversation(index)
            assert json.dumps(call) in tokenizer.decode(ids[learned])
