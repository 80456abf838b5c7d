"""A share of the training samples held out for validation: disjoint, complete, and the same whatever else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data import Causal, ChatOptions, Dataset, Masked, Order, open_dataset
from megatron_ds.data.held_out import HeldOut, SampleSubset
from megatron_ds.data.indexed.files import write_index
from megatron_ds.data.parts import begins_documents, ends_of
from megatron_ds.errors import DataError
from tests.data.dataset_checks import assert_equal_samples

Write = Callable[..., str]
Opener = Callable[..., tuple[Dataset, Dataset, Dataset]]


@pytest.fixture
def split(tmp_path: Path) -> Opener:
    """All samples, those for training, and those for validation."""

    def opened(format: str, *sources: str, share: float, tokenizer: str | None = None, **more: Any) -> Any:
        objective = more.pop("objective", Causal())
        shared: Any = (format, objective, sources, 8, 4096, tokenizer, str(tmp_path / "cache"))
        parts = [HeldOut(share, validation) for validation in (False, True)]
        return (open_dataset(*shared, **more), *(open_dataset(*shared, held_out=part, **more) for part in parts))

    return opened


def contents(data: Dataset) -> list[bytes]:
    return [data.sample(index)["input_ids"].tobytes() for index in range(len(data))]


def examples(first: int, count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [number // 64, number % 64 + 1, 5]} for number in range(first, first + count)]


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.1, 5), (0.5, 25), (0.97, 48)])
def test_every_sample_is_in_one_part(write_jsonl: Write, split: Opener, share: float, number: int) -> None:
    """`round` of 0.97 * 50 is 48: to even."""
    everything, train, valid = split("tokenized", write_jsonl(examples(0, 50)), share=share)
    assert (len(train), len(valid)) == (50 - number, number)
    order = contents(everything)
    assert sorted(contents(train) + contents(valid)) == sorted(order) and len(set(order)) == 50
    for part in (train, valid):
        assert [order.index(one) for one in contents(part)] == sorted(order.index(one) for one in contents(part))
        assert not part.ordered and part.columns == everything.columns and part.seq_length == 8
        assert set(part.blank()) == set(everything.blank())
    assert train.describe() == f"{everything.describe()}; {number} of 50 samples held out"
    assert valid.describe() == f"{number} of 50 samples held out of {everything.describe()}"
    assert len({everything.fingerprint, train.fingerprint, valid.fingerprint}) == 3


def test_the_choice_is_the_same_for_other_content_order_and_seed(write_jsonl: Write, split: Opener) -> None:
    def chosen(first: int, **more: Any) -> list[int]:
        everything, _, valid = split("tokenized", write_jsonl(examples(first, 50)), share=0.2, **more)
        return [contents(everything).index(one) for one in contents(valid)]

    assert chosen(0) == chosen(100) == chosen(0, order=Order(7, 99, shuffle=True))
    assert np.diff(chosen(0)).max() > 1, "they are not one block"


def test_epochs_of_a_part_have_noise_of_their_own(write_jsonl: Write, wordpiece: str, tmp_path: Path) -> None:
    text = write_jsonl([{"text": "call me ishmael some years ago never mind how long " * 9}])
    objective = Masked(seed=1, num_token_types=2)
    everything = open_dataset("text", objective, [text], 8, 4096, wordpiece, str(tmp_path / "cache"))
    part = SampleSubset(everything, np.asarray([1, 4]), "", "")
    seen = set()
    for epoch in range(8):
        for number, place in enumerate((1, 4)):
            sample = part.sample(epoch * 2 + number)
            assert_equal_samples(sample, everything.sample(epoch * len(everything) + place))
            seen.add((number, sample["targets"].tobytes()))
    assert len(seen) > 2, "the masks of a sample differ from epoch to epoch"


def test_sources_of_a_blend_are_divided_one_by_one(write_jsonl: Write, tmp_path: Path) -> None:
    sources = [write_jsonl(examples(100 * n, 10 * (n + 1)), f"{n}.jsonl") for n in range(2)]
    shared: Any = ("tokenized", Causal(), sources, 8, 4096, None, str(tmp_path / "cache"))
    part = HeldOut(0.2, validation=True, by_source=True)
    valid = open_dataset(*shared, held_out=part)
    order = Order(300, 1, shuffle=True)
    train = open_dataset(*shared, held_out=HeldOut(0.2, False, True), weights=[3, 1], order=order)
    assert len(valid) == 2 + 4
    assert not set(contents(valid)) & set(contents(train)) and len(set(contents(train))) == 8 + 16


def test_conversations_stay_whole(chat_tokenizer: Any, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": role, "content": f"call {row}"} for role in ("user", "assistant")]} for row in range(40)
    ]
    source, path = write_jsonl(rows), chat_tokenizer("header")
    for packing in (False, True):
        shared: Any = ("chat", Causal(), [source], 64, 4096, path, str(tmp_path / "cache"))
        options = ChatOptions(packing=packing)
        everything = open_dataset(*shared, options=options)
        train, valid = (open_dataset(*shared, options=options, held_out=HeldOut(0.1, one)) for one in (False, True))
        assert sorted(contents(train) + contents(valid)) == sorted(contents(everything))
        assert ends_of(train) == ends_of(everything) and list(ends_of(train).values()) == ["<|eot|>"]
        assert not begins_documents(train)


def test_what_cannot_be_divided_is_refused(write_jsonl: Write, split: Opener, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^data.valid_share=0.5 leaves no sample of .*data.jsonl for training: it has 1$"
    ):
        split("tokenized", write_jsonl(examples(0, 1)), share=0.5)
    tokens = np.zeros(400, dtype="<u2")
    tokens.tofile(tmp_path / "corpus.bin")
    write_index(tmp_path / "corpus.idx", tokens.dtype, [50] * 8, range(9))
    with pytest.raises(DataError, match=r"^data.valid_share=0.5 cannot hold out .* order of their own; use data.split"):
        split("indexed", str(tmp_path / "corpus"), share=0.5)
