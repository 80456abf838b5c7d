"""What can be got wrong in heads for labels, put in on purpose: each turns the verification red, after the blocks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_ds.hf import label_classes
from megatron_ds.hf.family import Row
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.models import label_head
from megatron_ds.models.label_head import LabelHeadConfig
from megatron_ds.verify import verify_hf
from tests.parity.label_head_cases import LABEL_HEAD_CASES

Patch = Callable[[pytest.MonkeyPatch], None]


def pick_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = label_head.picked_positions
    monkeypatch.setattr(label_head, "picked_positions", lambda *given: (right(*given) - 1).clamp(0))


def pick_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_head, "picked_positions", lambda head, ids, ends: ends)


def pick_of_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding before the text is passed over, and the text itself too."""

    def first(head: LabelHeadConfig, ids: Tensor, ends: Tensor) -> Tensor:
        return (ids != head.pick_id).int().argmax(1)

    monkeypatch.setattr(label_head, "picked_positions", first)


def other(**changes: Any) -> Patch:
    """A mistake in the translation of the config."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = label_classes._head
        monkeypatch.setattr(label_classes, "_head", lambda *given: replace(right(*given), **changes))

    patch.__name__ = "-".join(f"{name}={value}" for name, value in changes.items())
    return patch


def dense_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = label_classes._head_rows

    def rows(*given: Any) -> list[Row]:
        turned = replace(copy("h i"), sources=("i h",))
        return [replace(row, op=turned) if row.native == "head.dense.weight" else row for row in right(*given)]

    monkeypatch.setattr(label_classes, "_head_rows", rows)


MUTATIONS: list[tuple[Patch, str]] = [
    (pick_off_by_one, "llama-sequence"),
    (pick_without_padding, "llama-sequence"),
    (pick_of_the_first_token, "llama-sequence"),
    (pick_off_by_one, "t5-sequence"),
    (other(pick="mean"), "bert-sequence"),
    (other(activation="gelu"), "roberta-sequence"),
    (dense_transposed, "bert-sequence"),
    (other(problem=label_head.MULTI_LABEL), "llama-regression"),
]


@pytest.mark.parametrize(("mutate", "case"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_mutation_turns_the_verification_red(
    mutate: Patch, case: str, directory_of: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(LABEL_HEAD_CASES[case])
    mutate(monkeypatch)
    report = verify_hf(directory)
    assert not report.ok
    assert all(one.first_difference is None for one in report.inputs), "what precedes the head is right"
    assert not report.round_trip.changed, "a round trip alone sees nothing"
