"""`train.length_ramp`: lengths of rows over the steps, and what cannot be cut or shared."""

from typing import Any

import pytest

from megatron_ds.config import ContextPlan, check_ramped_lengths, length_stages
from megatron_ds.config.length_ramp import LengthRamp
from megatron_ds.errors import ConfigError, TopologyError


@pytest.mark.parametrize(
    ("seq_length", "start", "steps", "stages"),
    [
        (512, 64, 70, [(1, 64), (11, 128), (31, 256), (71, 512)]),
        (96, 16, 5, [(1, 16), (2, 32), (3, 48), (6, 96)]),
        (10, 1, 9, [(1, 1), (2, 2), (5, 5), (10, 10)]),
        (64, 32, 1, [(1, 32), (2, 64)]),
        (64, 32, 1000, [(1, 32), (1001, 64)]),
    ],
)
def test_lengths(seq_length: int, start: int, steps: int, stages: list[tuple[int, int]]) -> None:
    assert list(length_stages(seq_length, LengthRamp(start=start, steps=steps))) == stages
    for first_step, length in stages:  # DeepSpeed's fixed_linear, before it is rounded down
        reached = start + (seq_length - start) * (first_step - 1) / steps
        assert length <= reached and (first_step == 1 or length > reached - (seq_length - start) / steps)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (
            512,
            "train.length_ramp.start=512 is not less than data.seq_length=512, to which rows grow; try a smaller one",
        ),
        (
            48,
            "train.length_ramp.start=48 does not divide data.seq_length=512, and rows are cut into equal ones; "
            "nearest: 32 or 64",
        ),
    ],
)
def test_lengths_that_do_not_fit(make_run: Any, start: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_run(train={"length_ramp": {"start": start, "steps": 10}})
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("sections", "plan", "causal", "kind", "says"),
    [
        ({"data": {"format": "chat"}}, ContextPlan(), True, ConfigError, "cannot be with data.format=chat: it needs a"),
        (
            {"data": {"long_context": {0: 1.0}, "packing": True}},
            ContextPlan(),
            True,
            ConfigError,
            "cannot be with data.packing=true: it",
        ),
        ({}, ContextPlan(), False, ConfigError, "cannot be with an objective that is not causal: it"),
        (
            {"parallel": {"tensor": 3, "sequence": True}, "data": {"seq_length": 96}},
            ContextPlan(),
            True,
            TopologyError,
            "train.length_ramp.start=8 is not divisible by 3, as the ranks that divide rows need; nearest: 6 or 12",
        ),
        (
            {"parallel": {"context": 3}, "data": {"seq_length": 96}},
            ContextPlan(ulysses=3, rope="dynamic"),
            True,
            TopologyError,
            "train.length_ramp.start=8 is not divisible by 3, as the ranks that divide rows need; nearest: 6 or 12",
        ),
    ],
)
def test_rows_that_cannot_be_cut_or_shared(
    make_run: Any, sections: dict[str, Any], plan: ContextPlan, causal: bool, kind: type[Exception], says: str
) -> None:
    run = make_run(**{**sections, "train": {"length_ramp": {"start": 8, "steps": 10}}})
    with pytest.raises(kind) as caught:
        check_ramped_lengths(run, plan, is_causal=causal)
    assert says in str(caught.value)


def test_padded_rows_of_context_ranks_may_have_any_length(make_run: Any) -> None:
    run = make_run(parallel={"context": 3}, train={"length_ramp": {"start": 8, "steps": 10}})
    check_ramped_lengths(run, ContextPlan(ulysses=3), is_causal=True)
