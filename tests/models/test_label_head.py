"""Which position a head for labels reads, what it refuses, and that sums are over the labels of the global batch."""

import math

import pytest
import torch

from megatron_ds.errors import DataError
from megatron_ds.hf.config import read_model
from megatron_ds.models.label_head import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    LabelHeadConfig,
    label_loss,
    picked_positions,
)
from megatron_ds.models.sequential import SequentialModel
from tests.parity.label_head_cases import LABEL_HEAD_CASES
from tests.parity.label_heads import draw_labels, head_of_model, label_columns

PADDING, END = 9, 2
LAST = LabelHeadConfig(pick="last", pick_id=PADDING, num_labels=2)
LAST_END = LabelHeadConfig(pick="last_eos", pick_id=END, num_labels=2)


def picked(head: LabelHeadConfig, *rows: list[int]) -> list[int]:
    ids = torch.tensor(rows)
    return picked_positions(head, ids, torch.full((len(rows),), ids.shape[1] - 1)).tolist()


def test_the_last_token_that_is_no_padding() -> None:
    """Behind padding, without any, with padding before the text and within it, and of padding alone: the first."""
    rows = [[1, 3, 9, 9], [1, 3, 4, 5], [9, 9, 1, 3], [1, 9, 3, 9], [9, 9, 9, 9], [1, 9, 9, 9]]
    assert picked(LAST, *rows) == [1, 3, 3, 2, 0, 0]


def test_an_end_that_is_the_padding_is_not_read() -> None:
    """As in transformers: the token before the row's own end is."""
    assert picked(LAST, [1, 3, 9, 9], [1, 3, 4, 9]) == [1, 2]


def test_without_an_id_of_padding_the_last_position() -> None:
    head = LabelHeadConfig(pick="last", num_labels=2)
    assert picked(head, [1, 3, 9, 9]) == [3]
    head.check_ids({"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(DataError, match=r"^pad_token_id=None: the last token of 2 rows .*; add pad_token_id to config"):
        head.check_ids({"input_ids": torch.ones(2, 4, dtype=torch.int64)})


def test_a_negative_id_of_padding_is_in_no_row() -> None:
    """Such as -1 in old configs."""
    assert picked(LabelHeadConfig(pick="last", pick_id=-1, num_labels=2), [1, 3, 9, 9]) == [3]


def test_the_last_end() -> None:
    assert picked(LAST_END, [2, 3, 2, 0], [3, 3, 2, 2]) == [2, 3]
    LAST_END.check_ids({"input_ids": torch.tensor([[2, 3, 2, 0], [3, 3, 2, 2]])})


@pytest.mark.parametrize("rows", [[[3, 2, 0], [2, 2, 0]], [[3, 2, 0], [3, 3, 0]], [[3, 3, 0]]])
def test_rows_with_other_numbers_of_ends_are_refused(rows: list[list[int]]) -> None:
    """transformers fails at them, or at a row without an end."""
    with pytest.raises(DataError, match=r"ids eos_token_id=2, the rows have \[.*; all must have the same number"):
        LAST_END.check_ids({"input_ids": torch.tensor(rows)})


def test_one_label_is_a_regression_and_several_exclude_one_another() -> None:
    """Whatever dtype the labels have."""
    one = LabelHeadConfig(pick="first", num_labels=1)
    assert (one.loss, one.label_column) == (REGRESSION, "label_scores")
    assert (LAST.loss, LAST.label_column) == (SINGLE_LABEL, "label")
    assert LabelHeadConfig(pick="each", num_labels=1).label_column == "token_label"
    multi = LabelHeadConfig(pick="last", num_labels=2, problem=MULTI_LABEL)
    assert (multi.loss, multi.label_column) == (MULTI_LABEL, "label_scores")


@pytest.mark.parametrize("problem", [REGRESSION, MULTI_LABEL])
def test_scores_that_are_missing_carry_no_loss(problem: str) -> None:
    """The others do as if they were alone, also in the gradient."""
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.1]], requires_grad=True)
    label_loss(logits, torch.tensor([[1.0, math.nan], [0.0, 1.0]]), problem).backward()
    alone = logits.detach().clone().requires_grad_()
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    each = label_loss(alone[:1, :1], known[:1, :1], problem) + label_loss(alone[1:], known[1:], problem)
    each.backward()
    assert torch.equal(logits.grad, alone.grad) and logits.grad[0, 1] == 0.0


@pytest.mark.parametrize("case", ["llama-sequence", "llama-token", "bert-sequence", "t5-sequence"])
def test_nothing_stays_on_the_cpu_or_waits_for_the_device(case: str) -> None:
    """As in test_devices.py: on torch's meta device a value that is read raises, and so does a tensor on the CPU."""
    core = read_model(LABEL_HEAD_CASES[case]).core
    head = head_of_model(core)
    model = SequentialModel(core.build_layers()).eval().to("meta")
    columns = {name: column.to("meta") for name, column in label_columns(core).items()}
    labels = {head.label_column: draw_labels(head).to("meta")}
    assert model(columns)["logits"].device.type == "meta"
    assert model(columns, labels).device.type == "meta"
