"""Mistakes in generation that the comparison with transformers must see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.generation import generator, open_generator
from megatron_ds.layers.key_value_cache import Continuation, KeyValueCache
from megatron_ds.models import embedding_and_head
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.runtime import load_model
from tests.generation.models import KINDS, NEW_TOKENS, PROMPTS, continue_by_transformers
from tests.ranks import rank_device, run_ranks

Trap = Callable[[], None]
ROPE, WINDOW = KINDS["rope, grouped heads"], "mistral-window"


def padding_is_text() -> None:
    """The padding of shorter prompts is attended to, and counts as positions."""
    generator._positions = lambda padding, capacity, device: None


def window_forgets_a_key() -> None:
    """The oldest key of a window is forgotten one token too early."""
    begin = KeyValueCache.__init__

    def forgetting(self: KeyValueCache, rows: Continuation, window: int | None) -> None:
        begin(self, rows, window)
        self.num_seen -= 1

    KeyValueCache.__init__ = forgetting  # type: ignore[method-assign]


def positions_begin_anew() -> None:
    """Each token is rotated as if it were the first."""
    Continuation.new_positions = lambda self, count, batch, device: torch.arange(count).repeat(batch, 1)  # type: ignore[method-assign]


def each_rank_chooses_of_its_shard() -> None:
    embedding_and_head.gather_logits = lambda hidden, head: hidden @ head.weight.t()


def encoder_reads_padding() -> None:
    first = generator.Generator._first_columns

    def unmasked(self: Any, batch: Any) -> Any:
        columns, padding = first(self, batch)
        columns.pop("attention_mask", None)
        return columns, padding

    generator.Generator._first_columns = unmasked  # type: ignore[method-assign]


def short_frequencies_stay() -> None:
    """Keys rotated by the frequencies of short texts stay as they are in a long one."""
    begin = generator.Generator.__init__

    def forgetful(self: Any, *args: Any) -> None:
        begin(self, *args)
        self._read_again = set()

    generator.Generator.__init__ = forgetful  # type: ignore[method-assign]


TRAPS = [
    (padding_is_text, ROPE, 1),
    (window_forgets_a_key, WINDOW, 1),
    (positions_begin_anew, ROPE, 1),
    (each_rank_chooses_of_its_shard, ROPE, 2),
    (encoder_reads_padding, KINDS["relative biases, encoder"], 1),
    (short_frequencies_stay, KINDS["rope of two lengths"], 1),
]


def generate(info: RankInfo, trap: Trap | None, directory: Path, tp: int) -> list[list[int]]:
    if trap is not None:
        trap()
    rows = open_generator(load_model(directory), info.rank, rank_device(), tp=tp).generate(PROMPTS, NEW_TOKENS)
    return [row.ids for row in rows]


@pytest.mark.parametrize(
    ("trap", "case", "tp"),
    [pytest.param(*one, marks=() if number < 2 else pytest.mark.sweep) for number, one in enumerate(TRAPS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_trap_turns_it_red(trap: Trap, case: str, tp: int, once: Any) -> None:
    directory, expected = once(continue_by_transformers, case)
    if case == WINDOW:
        assert run_ranks(generate, tp, None, directory, tp)[0] == expected
    assert run_ranks(generate, tp, trap, directory, tp)[0] != expected
