"""Declared columns: shapes, padding, blank samples, and declarations from outside."""

import math

import numpy as np
import pytest
import torch

from megatron_ds import columns
from megatron_ds.columns import COLUMNS, IGNORE_INDEX, Column, declare, find_column
from megatron_ds.data import blank_sample
from megatron_ds.errors import ConfigError
from megatron_ds.models.sequential import count_entries

# name: (shape of a sample with S = 4 and T = 3, blank values, [7, 7] padded to 4)
DECLARED = {
    "input_ids": ((4,), [0, 0, 0, 0], [7, 7, 0, 0]),
    "targets": ((3,), [-100, -100, -100], [7, 7, -100, -100]),
    "attention_mask": ((4,), [True] * 4, [True, True, False, False]),
    "token_type_ids": ((4,), [0, 0, 0, 0], [7, 7, 0, 0]),
    "next_sentence_label": ((), -100, None),
    "label": ((), -100, None),
    "token_label": ((4,), [-100] * 4, [7, 7, -100, -100]),
    "decoder_input_ids": ((3,), [0, 0, 0], [7, 7, 0, 0]),
    "decoder_attention_mask": ((3,), [True] * 3, [True, True, False, False]),
    "position_ids": ((4,), [0, 1, 2, 3], [7, 7, 0, 1]),
}


@pytest.fixture(autouse=True)
def own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test declares."""
    monkeypatch.setattr(COLUMNS, "_entries", dict(COLUMNS.items()))


def test_every_declared_column_is_in_the_table() -> None:
    assert set(COLUMNS.names) == {*DECLARED, "label_scores"}


@pytest.mark.parametrize("name", DECLARED)
def test_shape_blank_and_padding(name: str) -> None:
    shape, blank, padded = DECLARED[name]
    column = find_column(name)
    dtype = bool if name.endswith("attention_mask") else np.int64
    assert column.shape(4, 3) == shape and column.shape(4, None) == (shape and (4,))
    sample = blank_sample((name,), 4, 3)
    assert sample[name].dtype == dtype and sample[name].tolist() == blank
    if padded is not None:
        found = column.pad(np.array([7, 7]).astype(dtype), 4)
        assert found.dtype == dtype and found.tolist() == padded


def test_a_padding_id_takes_the_place_of_the_fill() -> None:
    assert columns.INPUT_IDS.pad(np.array([7, 7]), 4, 5).tolist() == [7, 7, 5, 5]


def test_labels_that_carry_loss() -> None:
    assert columns.TARGETS.carries_loss(np.array([3, IGNORE_INDEX, 0])).tolist() == [True, False, True]
    with pytest.raises(AssertionError, match="input_ids is not a label column"):
        columns.INPUT_IDS.carries_loss(np.array([3]))


def test_scores_have_a_number_for_each_label() -> None:
    """A blank sample has none, and a missing one carries no loss."""
    column = columns.LABEL_SCORES
    assert column.shape(4, None, 3) == (3,)
    blank = blank_sample(("input_ids", "label_scores"), 4, None, 3)["label_scores"]
    assert blank.dtype == np.float32 and not column.carries_loss(blank).any()
    assert column.carries_loss(np.array([0.0, np.nan, -100.0], dtype=np.float32)).tolist() == [True, False, True]
    assert count_entries({"label_scores": torch.tensor([[0.0, math.nan], [1.0, 2.0]])}).tolist() == [3]


def test_columns_from_outside() -> None:
    scores = declare(Column("scores", "sample", "float32", fill=0.0))
    assert declare(Column("scores", "sample", "float32", fill=0.0)) is scores is find_column("scores")
    blank = blank_sample(("input_ids", "scores"), 2, None)
    assert blank["scores"].dtype == np.float32 and blank["scores"].tolist() == 0.0
    with pytest.raises(ConfigError, match=r"^column scores is already declared as Column\(.*rename one$"):
        declare(Column("scores", "sequence", "float32"))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^column=target is not one of input_ids, .*; did you mean targets\?$"):
        find_column("target")
