"""Generation at layouts against transformers' greedy search, token for token, prompts of different lengths together."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.generation import open_generator
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.runtime import load_model
from tests.generation.models import KINDS, NEW_TOKENS, PROMPTS, continue_by_transformers
from tests.ranks import rank_device, run_ranks

LAYOUTS = ((1, 1), (2, 1), (1, 2))
SAMPLE = {case: LAYOUTS[number % 3] for number, case in enumerate(KINDS.values())}


def combinations() -> list[Any]:
    """Each kind at each layout; one layout of each outside of a sweep, and all of the first kind."""
    return [
        pytest.param(case, tp, pp, marks=() if (tp, pp) == SAMPLE[case] or number == 0 else pytest.mark.sweep)
        for number, case in enumerate(KINDS.values())
        for tp, pp in LAYOUTS
    ]


def generate(info: RankInfo, directory: Path, tp: int, pp: int, batch_size: int) -> list[list[int]]:
    generator = open_generator(load_model(directory), info.rank, rank_device(), tp=tp, pp=pp)
    return [row.ids for row in generator.generate(PROMPTS, NEW_TOKENS, batch_size=batch_size)]


@pytest.mark.parametrize(("case", "tp", "pp"), combinations())
def test_equals_transformers(case: str, tp: int, pp: int, once: Any) -> None:
    directory, expected = once(continue_by_transformers, case)
    assert len({token for row in expected for token in row}) > 5, "the model repeats itself"
    for found in run_ranks(generate, tp * pp, directory, tp, pp, 3):
        assert found == expected
