"""Labels of context ranks: together they are those of whole rows, and heads for which they would not be are refused."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ds.columns import COLUMNS, Column
from megatron_ds.errors import ConfigError
from megatron_ds.models.sequential import HeadSpec, count_entries
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Axis

TARGETS = torch.arange(32).view(2, 16).masked_fill(torch.arange(16) % 5 == 3, -100)
BATCH = {"targets": TARGETS, "label": torch.tensor([1, -100]), "undeclared": torch.zeros(2, 16)}


def part(rank: int, size: int = 2) -> ContextParallel:
    """Of one of the ranks of a ring, without its group."""
    axis = Axis(size, rank, tuple(range(size)))
    return ContextParallel(axis, Axis(), axis, zigzag=True)


def test_parts_are_the_whole() -> None:
    head = HeadSpec.per_column("targets", "label")
    found = [head.labels_in(head.with_own_labels(BATCH, part(rank))) for rank in range(2)]
    at = [index for rank in range(2) for run in part(rank).runs(16) for index in run]
    assert torch.equal(torch.cat([one["targets"] for one in found], 1), TARGETS[:, at])
    assert [one["label"].tolist() for one in found] == [[1, -100], [-100, -100]]
    for one in found:
        column = one["targets"].t().flatten()
        assert torch.equal(one["targets.positions"], (column != -100).nonzero().squeeze(1))
    head.check_parts(BATCH, BATCH, part(0))


def _first_left_out(labels: Mapping[str, Tensor]) -> Tensor:
    """Without the first three labels of a row."""
    return count_entries({"targets": labels["targets"][:, 3:]})


def _all_positions(labels: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor([labels["targets"].numel()])


def _undeclared(labels: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor([labels["undeclared"].numel()])


PADDED = {**BATCH, "targets": torch.cat([TARGETS, torch.full((2, 4), -100)], 1)}


@pytest.mark.parametrize(
    ("head", "padded"),
    [
        (HeadSpec(("targets",), ("loss",), _first_left_out), BATCH),
        (HeadSpec(("targets",), ("loss",), _all_positions), PADDED),
        (HeadSpec(("undeclared",), ("loss",), _undeclared), BATCH),
    ],
    ids=["by place", "padding", "undeclared"],
)
def test_other_labels_in_parts_are_refused(head: HeadSpec, padded: dict[str, Tensor]) -> None:
    head.check_parts(BATCH, padded, part(0, size=1))
    with pytest.raises(ConfigError, match=r"labels of loss in a batch, .* in the parts .*; try parallel[.]context=1"):
        head.check_parts(BATCH, padded, part(1))
    replace(head, divides_labels=False).check_parts(BATCH, padded, part(1))


def test_labels_of_a_sample_need_a_value_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    label = replace(COLUMNS.get("label"), ignored=None)
    assert isinstance(label, Column)
    monkeypatch.setattr("megatron_ds.models.sequential.find_column", lambda name: label)
    with pytest.raises(ConfigError, match=r"labels label carry loss on one context rank alone.*try Column[(]'label'"):
        HeadSpec.per_column("label").with_own_labels(BATCH, part(0))
