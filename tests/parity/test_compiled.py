"""Compiled blocks train what plain ones do: five steps against transformers, within the bounds of the layouts."""

from dataclasses import replace
from typing import Any

import pytest

from tests.parity.cases import Recipe
from tests.parity.context_cases import GATHER_2, RING_2, ULYSSES_2, with_axes
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_ours

COMPILED = [("gpt2", Place(1, 1, 1, 1))]  # graphs of tensor ranks are counted in tests/models/test_compiled_graphs.py
MORE = [
    ("gpt2", Place(2, 1, 1, 1, True)),
    ("gpt2", Place(1, 2, 1, 1)),
    ("qwen3", Place(2, 1, 1, 1, True)),
    ("gemma3_text-two-ropes", Place(1, 1, 2, 2, recompute="full")),
    ("llama", Place(1, 1, 1, 0)),
    ("gemma2-caps", Place(2, 1, 1, 1, recompute="selective")),
    ("falcon-7b-alibi", Place(1, 1, 2, 1)),
    ("bert-pretraining", Place(2, 1, 1, 1)),
    ("t5-gated", Place(1, 2, 1, 1)),
    ("llama", Place(2, 1, 2, 3)),
    ("olmo2-all-heads", Place(2, 2, 1, 1, True)),
    ("apertus-bias", Place(2, 1, 1, 1, True, recompute="full")),
    ("ministral3-yarn", Place(2, 1, 1, 1, recompute="selective")),
    ("hunyuan_v1_dense-alpha", Place(1, 2, 1, 1)),
    ("cohere-normed-two-kv-heads", Place(4, 1, 1, 1)),
    ("nemotron-bias", Place(1, 1, 2, 3)),
    ("qwen3", ULYSSES_2),
    ("gemma2-caps", GATHER_2),
    ("llama", with_axes(RING_2, 2, 1, 1, 1, True)),
    ("llama", replace(RING_2, recompute="full")),
    ("t5-gated", RING_2),
]


@pytest.mark.parametrize(
    ("case", "place"), [*COMPILED, *(pytest.param(*one, marks=pytest.mark.sweep) for one in MORE)], ids=str
)
def test_compiled_blocks(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, Recipe())
    errors = relative_errors(train_ours(directory, replace(place, compiled=True), Recipe()), reference)
    assert within_fp32(errors), errors
