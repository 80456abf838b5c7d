"""Each known trap of divided sequences, put in on purpose, turns the check of parity red.

Each patch is applied in the forked ranks only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor

from megatron_ds.engine import base, build
from megatron_ds.engine.pipeline import module as pipeline_module
from megatron_ds.engine.zero import ZeroEngine
from megatron_ds.layers import attention
from megatron_ds.layers.attention_masks import Span
from megatron_ds.layers.context import fetch, ring
from megatron_ds.layers.context.ulysses import HeadExchange
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models import sequential
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Grid
from tests.parity.cases import Recipe
from tests.parity.context_cases import GATHER_2, GATHER_4, PACKED, PADDED, RECIPE, RING_2, ULYSSES_2, with_axes
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_on
from tests.ranks import run_grid


def another_stripe() -> None:
    """Tokens are divided into consecutive parts, and attention takes them for two chunks each."""

    def consecutive(self: ContextParallel, length: int, rank: int | None = None) -> tuple[range, ...]:
        size, index = length // self.axis.size, self.axis.rank if rank is None else rank
        return (range(index * size, (index + 1) * size),)

    ContextParallel.runs = consecutive  # type: ignore[method-assign]


def another_rank_of_the_ring() -> None:
    """A rank takes its neighbour's chunks for its own."""
    held = ContextParallel.ring_runs
    ContextParallel.ring_runs = lambda self, length, rank=None: held(  # type: ignore[method-assign]
        self, length, ((self.ring.rank if rank is None else rank) + 1) % self.ring.size
    )
    runs = ContextParallel.runs
    ContextParallel.runs = lambda self, length, rank=None: runs(  # type: ignore[method-assign]
        self, length, ((self.axis.rank if rank is None else rank) - self.ulysses.size) % self.axis.size
    )


def own_key_not_seen() -> None:
    """A query sees the keys before its own position."""
    Span.offset = property(lambda self: self.queries.start - self.keys.start - 1)  # type: ignore[assignment]


def next_key_seen() -> None:
    """A query sees the key behind its own position too."""
    Span.offset = property(lambda self: self.queries.start - self.keys.start + 1)  # type: ignore[assignment]


def documents_of_the_part() -> None:
    """Documents are counted from the first query of a span, so that one that began before it is another one."""
    allowed = attention.allowed_keys

    def counted(length: int, window: Any, mask: Any, device: Any, positions: Any = None, span: Any = None) -> Any:
        if positions is not None and span is not None:
            positions = positions.clone()
            positions[:, span.queries.start] = 0
        return allowed(length, window, mask, device, positions, span)

    attention.allowed_keys = counted


def rotations_by_local_positions() -> None:
    """Every rank rotates its tokens as if its part were the whole."""
    whole = RotaryTable.cos_sin

    def local(self: RotaryTable, length: int, like: Tensor, every: bool = True) -> tuple[Tensor, Tensor]:
        cos, sin = whole(self, length, like, True)
        size = length if every else length // self.context.axis.size
        return cos[:size], sin[:size]

    RotaryTable.cos_sin = local  # type: ignore[method-assign]


def mean_of_the_means_of_parts() -> None:
    """The loss of a rank's tokens is divided by the number of its labels, and averaged over ranks."""

    def own(self: base.Engine, batches: Sequence[Any]) -> tuple[int, ...]:
        columns = [self.head.labels_in(self.head.with_own_labels(batch, self.context)) for batch in batches]
        labels = [{name: found[name] for name in self.head.label_columns} for found in columns]
        counts = torch.stack([self.head.count_labels(each) for each in labels]).sum(0)
        return tuple((counts * self.grid.loss.size).tolist())

    base.Engine._count = own  # type: ignore[method-assign]


def scale_without_context() -> None:
    """The loss is not multiplied by the number of context ranks, over which DeepSpeed averages gradients."""
    step = ZeroEngine._step
    ZeroEngine._step = lambda self, batches, scales: step(  # type: ignore[method-assign]
        self, batches, [scale / self.grid.context.size for scale in scales]
    )


def fourth_axis_of_deepspeed() -> None:
    """Context ranks are an axis of DeepSpeed's topology instead of data ranks."""
    pipeline_module.PipeModelDataParallelTopology = lambda num_pp, num_mp, num_dp: ProcessTopology(
        ["pipe", "data", "context", "model"], [num_pp, num_dp // 2, 2, num_mp]
    )
    build._counting_context = lambda options, grid: options


def labels_of_rows_on_every_rank() -> None:
    """A label of a row is counted once, and carries loss on each rank that has a part of the row."""
    own = sequential._own_labels
    sequential._own_labels = lambda labels, column, context, rank: (
        own(labels, column, context, rank) if column.has_positions else labels
    )
    sequential.HeadSpec.check_parts = lambda *given: None  # type: ignore[method-assign]


def fetched_keys_learn_nothing() -> None:
    """Keys and values that came from other ranks return no gradient."""
    backward = fetch._Fetch.backward

    def only_own(ctx: Any, *grads: Tensor) -> Any:
        own = torch.zeros(len(grads[0]), dtype=torch.bool)
        begin = sum(ctx.plan.num_received[: ctx.axis.rank])
        own[ctx.plan.places[begin : begin + ctx.plan.num_received[ctx.axis.rank]]] = True
        return backward(ctx, grads[0] * own[:, None, None, None, None])

    fetch._Fetch.backward = staticmethod(only_own)  # type: ignore[assignment]


def first_heads_on_every_rank() -> None:
    """After the exchange every rank takes its heads for the first ones, whose biases grow fastest."""
    HeadExchange.heads = property(  # type: ignore[assignment]
        lambda self: self.held[: len(self.held) // self.axis.size]
    )


def key_heads_by_old_groups() -> None:
    """A rank's query heads read key heads as if it had all of the tensor rank's."""
    HeadExchange.kv_of_head = property(  # type: ignore[assignment]
        lambda self: tuple(head % (len(self.sent) // self.axis.size) for head in self.kv_of_held[self.share])[::-1]
    )


def merged_without_rescaling() -> None:
    """What a query has seen so far keeps its weight when further keys are added."""
    merge = ring.merge_

    def merge_(total: Tensor, lse: Tensor, out: Tensor, part: Tensor) -> None:
        before = total.clone()
        share = torch.sigmoid(part - lse).masked_fill(part == -torch.inf, 0.0)
        merge(total, lse, out, part)
        total += before * share.permute(2, 0, 1)[..., None]

    ring.merge_ = merge_


def empty_rows_with_a_weight() -> None:
    """A query that sees none of a block's keys has the log-sum-exp 0 there."""
    merge = ring.merge_
    ring.merge_ = lambda total, lse, out, part: merge(total, lse, out, part.masked_fill(part == -torch.inf, 0.0))


def gradients_of_the_next_rank() -> None:
    """The gradients of keys and values go one hop less than the full circle."""

    def home(self: Any) -> Tensor:
        self._arrived()
        return self._free[-1]

    ring._Circle.home = home  # type: ignore[method-assign]


TRAPS: list[tuple[Callable[[], None], str, Place, Recipe]] = [
    (another_rank_of_the_ring, "llama", GATHER_4, RECIPE),
    (own_key_not_seen, "llama", GATHER_2, RECIPE),
    (next_key_seen, "mistral", GATHER_2, RECIPE),
    (documents_of_the_part, "llama", GATHER_2, PACKED),
    (rotations_by_local_positions, "llama", ULYSSES_2, RECIPE),
    (mean_of_the_means_of_parts, "llama", ULYSSES_2, RECIPE),
    (scale_without_context, "llama", ULYSSES_2, RECIPE),
    (fourth_axis_of_deepspeed, "llama", with_axes(ULYSSES_2, 1, 2, 1, 1), RECIPE),
    (labels_of_rows_on_every_rank, "bert-pretraining", ULYSSES_2, RECIPE),
    (fetched_keys_learn_nothing, "llama", GATHER_2, RECIPE),
    (another_stripe, "llama", RING_2, RECIPE),
    (merged_without_rescaling, "llama", RING_2, RECIPE),
    (empty_rows_with_a_weight, "llama", RING_2, PADDED),
    (gradients_of_the_next_rank, "llama", RING_2, RECIPE),
    (first_heads_on_every_rank, "bloom-tied", ULYSSES_2, RECIPE),
    (key_heads_by_old_groups, "llama-uneven", with_axes(ULYSSES_2, 2, 1, 1, 1), RECIPE),
]


def _train_in_the_trap(
    grid: Grid, trap: Callable[[], None], directory: Path, place: Place, recipe: Recipe
) -> dict[str, Any]:
    trap()
    return train_on(grid, directory, place, recipe)


# In the sweep alone: like others of the list, on more ranks.
SWEPT = (another_rank_of_the_ring, next_key_seen, key_heads_by_old_groups)


@pytest.mark.parametrize(
    ("trap", "case", "place", "recipe"),
    [
        pytest.param(
            *one, marks=[pytest.mark.sweep] if one[0] in SWEPT else [], id=f"{one[0].__name__}-{one[1]}-{one[2]}"
        )
        for one in TRAPS
    ],
)
def test_a_trap_turns_parity_red(
    trap: Callable[[], None], case: str, place: Place, recipe: Recipe, references: Any
) -> None:
    recipe = replace(recipe, steps=2)  # enough to see each of them, and so are five
    directory, reference = references(case, recipe)
    caught = relative_errors(run_grid(_train_in_the_trap, place.layout, trap, directory, place, recipe)[0], reference)
    assert not within_fp32(caught), caught
