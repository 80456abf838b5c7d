"""Data without a label that carries loss are refused, for every kind of model; a sample without one is not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data import Causal, DataObjective, Dataset, Masked, Order, Seq2Seq, open_dataset
from megatron_ds.data.labels import count_labels, mean_labels, require_labels, sampled_ends
from megatron_ds.data.parts import parts_of
from megatron_ds.errors import DataError

IGNORED = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
PAIR = {**IGNORED, "next_sentence_label": -100}
MASKED = Masked(seed=0, num_token_types=2)
WITH_PAIRS = Masked(seed=0, num_token_types=2, next_sentence=True)
Write = Callable[..., str]


@pytest.fixture
def open_tokenized(tmp_path: Path) -> Callable[..., Dataset]:
    def opener(objective: DataObjective, *sources: str, **order: Any) -> Dataset:
        return open_dataset("tokenized", objective, sources, 8, 61, cache_dir=str(tmp_path / "cache"), **order)

    return opener


def refused(data: Dataset, columns: Sequence[str] = ("targets",), field: str = "data.train") -> str:
    with pytest.raises(DataError) as caught:
        require_labels(data, columns, field, "mine.jsonl", "try others")
    return str(caught.value)


@pytest.mark.parametrize(
    ("objective", "lines", "columns"),
    [
        (Causal(), [IGNORED] * 2, ("targets",)),
        (Causal(), [{"input_ids": [5, 6], "labels": [5, -100]}] * 2, ("targets",)),  # nothing predicts the first
        (Causal(), [{"input_ids": [5]}] * 2, ("targets",)),
        (MASKED, [IGNORED] * 2, ("targets",)),
        (WITH_PAIRS, [PAIR] * 2, ("targets", "next_sentence_label")),
        (Seq2Seq(seed=0, decoder_start_id=0), [{"input_ids": [5, 6], "labels": [-100]}] * 2, ("targets",)),
    ],
)
def test_data_without_a_label_are_refused(
    objective: DataObjective, lines: Any, columns: Any, write_jsonl: Write, open_tokenized: Any
) -> None:
    data = open_tokenized(objective, write_jsonl(lines))
    assert refused(data, columns) == (
        "data.train: mine.jsonl: no label carries loss in any of 2 samples, so there is nothing to learn; try others"
    )
    assert refused(data, columns, "data.valid").endswith("so there is nothing to validate; try others")


@pytest.mark.parametrize(
    ("objective", "last", "columns", "labels"),
    [
        (Causal(), {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, ("targets",), 1),
        (WITH_PAIRS, {**PAIR, "next_sentence_label": 0}, ("targets", "next_sentence_label"), 1),
        (Seq2Seq(seed=0, decoder_start_id=0), {"input_ids": [5], "labels": [3, 4]}, ("targets",), 2),
    ],
)
def test_one_label_in_the_last_sample_is_enough(
    objective: DataObjective, last: Any, columns: Any, labels: int, write_jsonl: Write, open_tokenized: Any
) -> None:
    empty = {name: value for name, value in PAIR.items() if name in last or name == "labels"}
    data = open_tokenized(objective, write_jsonl([empty] * 3 + [last]))
    require_labels(data, columns, "data.train", "mine.jsonl", "")
    assert count_labels(data.sample(3), columns) == labels
    assert mean_labels(data, columns) == (labels / 4, True)


def test_each_source_of_a_blend_needs_a_label(write_jsonl: Write, open_tokenized: Any) -> None:
    sources = write_jsonl([{"input_ids": [5, 6, 7]}], "good.jsonl"), write_jsonl([IGNORED] * 4, "empty.jsonl")
    require_labels(open_tokenized(Causal(), *sources), ["targets"], "data.train", "both", "")
    blend = open_tokenized(Causal(), *sources, weights=[0.5, 0.5], order=Order(10, 0, True))
    assert [name for name, _ in parts_of(blend, "both")] == list(sources)
    assert refused(blend).startswith(f"data.train: {sources[1]}: no label carries loss in any of 4 samples")


@pytest.mark.parametrize(
    ("objective", "last", "ends"),
    [
        (Causal(), {"input_ids": [5, 6, 9], "labels": [-100, 6, 9]}, {9: "<end>"}),
        (Causal(), {"input_ids": [5, 6, 9, 0], "labels": [-100, 6, 9, -100]}, {9: "<end>"}),
        (Causal(), {"input_ids": [5, 6, 9]}, {9: "<end>"}),
        (Causal(), {"input_ids": [5, 9, 6]}, {}),
        (Causal(), IGNORED, {}),
        (Seq2Seq(seed=0, decoder_start_id=0), {"input_ids": [5], "labels": [3, 9, -100]}, {9: "<end>"}),
    ],
)
def test_the_end_that_token_ids_teach(
    objective: DataObjective, last: Any, ends: dict[int, str], write_jsonl: Write, open_tokenized: Any
) -> None:
    other = {"input_ids": [7, 7], "labels": [7, 7]}
    assert sampled_ends(open_tokenized(objective, write_jsonl([other] * 9 + [last])), {9: "<end>", 8: "<no>"}) == ends
    seldom = open_tokenized(objective, write_jsonl([other] * 10 + [last], "seldom.jsonl"))
    assert sampled_ends(seldom, {9: "<end>"}) == {}, "less than one in ten: an example that was cut there"
