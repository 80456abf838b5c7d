"""Log-likelihoods of continuations: rank 0 is asked for them, and all ranks compute them, in batches by length."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ds.columns import ATTENTION_MASK, DECODER_INPUT_IDS, IGNORE_INDEX, INPUT_IDS, TARGETS
from megatron_ds.engine import Engine
from megatron_ds.evaluation.shared_calls import SharedCalls
from megatron_ds.hf.config import HFModel

NOTE_EVERY_S = 30.0
CALL = "likelihoods"


class Request(NamedTuple):
    """A continuation whose likelihood is asked for.

    Attributes:
        context: ids before it, at least one.
        continuation: its ids, at least one.
    """

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """The likelihood of a continuation.

    Attributes:
        log_p: natural logarithm.
        is_greedy: whether greedy decoding would choose it.
    """

    log_p: float
    is_greedy: bool


class Scorer:
    """A model with a `LikelihoodHead` on all ranks.

    Args:
        engine: this rank's part of the model.
        model: the model.
        max_length: number of ids that a row may have; longer contexts are cut on the left.
        batch_size: rows of a forward pass on one rank.
        note: called with a line of text once in a while.
        calls: what rank 0 calls this by.
    """

    def __init__(
        self,
        engine: Engine,
        model: HFModel,
        max_length: int,
        batch_size: int,
        note: Callable[[str], None],
        calls: SharedCalls,
    ) -> None:
        self._engine, self._max_length, self._batch_size, self._note = engine, max_length, batch_size, note
        self._has_decoder = model.core.has_cross_attention
        self._start_id = int(getattr(model.config, "decoder_start_token_id", None) or 0)
        self._pads = not model.core.shape().length_ropes  # positions that depend on a row's length are not padded
        self._calls = calls
        calls.add(CALL, self._run)

    def score(self, requests: Sequence[Request]) -> list[Likelihood]:
        """Return the likelihoods of the continuations, in their order. Called on rank 0."""
        found: list[Likelihood] = [Likelihood(0.0, True)] * len(requests)
        noted_s, done = time.monotonic(), 0
        for batch in self._batches(requests):
            for index, one in zip(batch, self._calls.call(CALL, [requests[index] for index in batch])):
                found[index] = one
            done += len(batch)
            if time.monotonic() - noted_s > NOTE_EVERY_S:
                noted_s = time.monotonic()
                self._note(f"{done:,} of {len(requests):,} requests")
        return found

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Yield indices of the requests of one global batch after another, the longest first."""
        lengths = [self._lengths(one) for one in requests]
        size = self._batch_size * self._engine.grid.batch.size * self._engine.grid.pipeline.size
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda index: lengths[index], reverse=True):
            if len(batch) == size or (batch and not self._pads and lengths[index] != lengths[batch[0]]):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _lengths(self, request: Request) -> tuple[int, ...]:
        """Return the numbers of positions of a row: of the decoder, or of the encoder and the decoder."""
        context, continuation = request
        if self._has_decoder:
            return min(len(context), self._max_length), len(continuation)
        return (min(len(context) + len(continuation) - 1, self._max_length),)

    def _run(self, batch: Sequence[Request]) -> list[Likelihood]:
        """Compute a global batch. Collective over the world."""
        axis = self._engine.grid.batch
        columns = self._columns(batch)
        micro = math.ceil(len(batch) / (axis.size * self._batch_size)) * self._batch_size
        missing = axis.size * micro - len(batch)
        whole = {name: torch.cat([column, _without_loss(name, column, missing)]) for name, column in columns.items()}
        own = {name: column[axis.rank * micro : (axis.rank + 1) * micro] for name, column in whole.items()}
        parts = [
            {name: column[begin : begin + self._batch_size] for name, column in own.items()}
            for begin in range(0, micro, self._batch_size)
        ]
        kept = self._engine.evaluate(parts).kept[: len(batch)]
        return [Likelihood(float(log_p), not others) for log_p, others in kept]

    def _columns(self, batch: Sequence[Request]) -> dict[str, Tensor]:
        """Return the columns of a batch, (requests, longest), padded on the right."""
        if not self._has_decoder:
            rows = [(context + continuation)[-(self._max_length + 1) :] for context, continuation in batch]
            unlabelled = [max(0, len(row) - 1 - len(one.continuation)) for row, one in zip(rows, batch)]
            labels = [[IGNORE_INDEX] * count + row[1 + count :] for count, row in zip(unlabelled, rows)]
            return {INPUT_IDS.name: _padded([row[:-1] for row in rows], 0), TARGETS.name: _padded(labels, IGNORE_INDEX)}
        contexts = [one.context[-self._max_length :] for one in batch]
        shifted = [[self._start_id, *one.continuation[:-1]] for one in batch]
        return {
            INPUT_IDS.name: _padded(contexts, 0),
            ATTENTION_MASK.name: _padded([[1] * len(one) for one in contexts], 0).bool(),
            DECODER_INPUT_IDS.name: _padded(shifted, 0),
            TARGETS.name: _padded([one.continuation for one in batch], IGNORE_INDEX),
        }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return rows of ids as one tensor, padded on the right: (rows, longest) int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def _without_loss(name: str, column: Tensor, rows: int) -> Tensor:
    """Return rows that complete a batch: of the shape of a column's, without labels."""
    value = IGNORE_INDEX if name == TARGETS.name else 1 if column.dtype == torch.bool else 0
    return column.new_full((rows, *column.shape[1:]), value)
