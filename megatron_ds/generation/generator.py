"""Generation of token ids by one rank of a model: the prompts are read at once, then one token at a time is added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.engine import BuiltModule
from megatron_ds.errors import ConfigError, DataError, TopologyError
from megatron_ds.generation.sampling import GREEDY, Sampling
from megatron_ds.generation.stage import Stage
from megatron_ds.layers.rotary import BY_LENGTH
from megatron_ds.models.config import Decoding, ModelConfig
from megatron_ds.models.continuing import continuing
from megatron_ds.parallel.grid import Grid

OnToken = Callable[[int, int], None]
"""(number of the prompt, its next token)."""

IsStop = Callable[[Sequence[int]], bool]
"""The tokens of a row -> whether it ends there. It is called on every rank, and must return the same on all."""


@dataclass
class Row:
    """A prompt and what has been generated for it.

    Attributes:
        number: of the prompt.
        prompt: its ids.
        ids: the generated ids, that of the end included.
        stopped_by: "end", "stop" or "length"; empty = it has not ended.
    """

    number: int
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    stopped_by: str = ""


class Generator:
    """A model that continues token ids. Every rank has one, and calls its methods with the same arguments.

    Data ranks may have other prompts, unless experts are divided over them; then all have the same.

    Args:
        built: this rank's module, or that of an engine, `Engine.built`.
        core: the model.
        grid: the place of this rank.
        device: of its tensors.

    Raises:
        ConfigError: the model does not generate text.
        TopologyError: ranks divide sequences, or ZeRO-3 divides the weights.
    """

    def __init__(self, built: BuiltModule, core: ModelConfig, grid: Grid, device: torch.device) -> None:
        self._built, self._core, self._grid, self._device = built, core, grid, device
        self._decoding = decoding_of(core)
        _check_layout(built, grid)
        self._stage = Stage(built, self._decoding, grid, core.axis_sizes()["h"])
        ropes = [rope for stack in core.stacks.values() for rope in stack.rotary if rope is not None]
        # longrope rotates all keys by other frequencies from here on; "dynamic" ones stay as they were
        self._read_again = {rope.original_max_positions + 1 for rope in ropes if rope.scaling == "longrope"}
        self._by_length = any(rope.scaling in BY_LENGTH for rope in ropes)

    @property
    def has_encoder(self) -> bool:
        """The model reads a prompt apart from what it writes, instead of continuing it."""
        return self._decoding.start_id is not None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        end_ids: Sequence[int] = (),
        is_stop: IsStop | None = None,
        on_token: OnToken | None = None,
        batch_size: int = 8,
    ) -> list[Row]:
        """Continue prompts, in batches of those of about the same length; return them in the given order.

        Collective over the world. Per token and batch: the traffic of a forward pass of one position, an all-gather of
        the logits over tensor, and a broadcast of the tokens.

        Args:
            prompts: ids, at least one each.
            max_new_tokens: the most ids that are added to a prompt.
            sampling: the choice of the next token.
            end_ids: ids after which a row ends.
            is_stop: asked after each token of a row; None = nothing else ends a row.
            on_token: called with each token, on every rank.
            batch_size: the most prompts of a batch.

        Raises:
            ConfigError: a value is out of range.
            DataError: a prompt is empty, has ids that the model does not have, or is too long with its new tokens.
        """
        sampling.check()
        check_prompts(self._core, prompts, max_new_tokens)
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is less than one prompt; nearest: 1")
        rows = [Row(number, prompt) for number, prompt in enumerate(prompts)]
        for batch in self._batches(rows, batch_size):
            streams = sampling.streams([row.number for row in batch])
            for logits in self._logits(batch, max_new_tokens):
                chosen = self._agreed(sampling.choose(logits, streams) if logits is not None else None, len(batch))
                for row, token in zip(batch, chosen):
                    if not row.stopped_by:
                        row.ids.append(token)
                        row.stopped_by = end_of(row, end_ids, is_stop, max_new_tokens)
                        if on_token is not None:
                            on_token(row.number, token)
        return rows

    def _batches(self, rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
        """Yield rows of about the same length; of one length if frequencies of positions depend on it."""
        ordered = sorted(rows, key=lambda row: len(row.prompt))
        for _, group in groupby(ordered, key=lambda row: len(row.prompt) if self._by_length else 0):
            same = list(group)
            yield from (same[start : start + size] for start in range(0, len(same), size))

    @torch.no_grad()
    def _logits(self, batch: Sequence[Row], max_new_tokens: int) -> Iterator[Tensor | None]:
        """Yield the logits of the next token, (B, V) on the last stage, until all rows have ended.

        The caller adds the tokens to the rows meanwhile.
        """
        column, columns, padding = self._decoding.column, *self._first_columns(batch)
        length = columns[column].shape[1]
        with continuing(self._built.module, length + max_new_tokens) as state:
            state.positions = _positions(padding, state.capacity, self._device)
            ids, begins = columns[column], True
            while True:
                new = ids[:, state.num_past :]
                given = {**columns, column: new}
                if not begins or state.positions is not None:
                    given["position_ids"] = state.new_positions(new.shape[1], len(batch), self._device)
                yield self._stage.run(given, begins=begins)
                if all(row.stopped_by for row in batch):
                    return
                state.num_past, begins = ids.shape[1], False
                last = torch.tensor([row.ids[-1] for row in batch], device=self._device)
                ids = torch.cat([ids, last[:, None]], dim=1)
                if ids.shape[1] in self._read_again:
                    state.num_past, begins = 0, True

    def _first_columns(self, batch: Sequence[Row]) -> tuple[dict[str, Tensor], list[int]]:
        """Return the columns of the prompts, and the padding on the left of each row that grows."""
        longest = max(len(row.prompt) for row in batch)
        padding = [longest - len(row.prompt) for row in batch]
        if self._decoding.start_id is None:
            ids = [[*[row.prompt[0]] * count, *row.prompt] for row, count in zip(batch, padding)]
            return {"input_ids": torch.tensor(ids, device=self._device)}, padding
        filler = getattr(self._core, "padding_id", 0)
        ids = [[*row.prompt, *[filler] * count] for row, count in zip(batch, padding)]
        columns = {"input_ids": torch.tensor(ids, device=self._device)}
        if any(padding):
            seen = [[1] * len(row.prompt) + [0] * count for row, count in zip(batch, padding)]
            columns["attention_mask"] = torch.tensor(seen, device=self._device)
        columns[self._decoding.column] = torch.full((len(batch), 1), self._decoding.start_id, device=self._device)
        return columns, [0] * len(batch)

    def _agreed(self, chosen: Tensor | None, count: int) -> list[int]:
        """Return the tokens that the first tensor rank of the last stage has chosen.

        Collective over tensor on the last stage, and over pipeline; over the world if experts span data ranks.
        """
        if chosen is None:
            chosen = torch.empty(count, dtype=torch.int64, device=self._device)
        grid = self._grid
        if grid.experts_span_data:
            dist.broadcast(chosen, grid.layout.rank_of(pipeline=grid.pipeline.size - 1))
            return [int(token) for token in chosen.tolist()]
        if grid.tensor.size > 1 and self._stage.is_last:
            dist.broadcast(chosen, grid.tensor.ranks[0], group=grid.tensor.group)
        if grid.pipeline.size > 1:
            dist.broadcast(chosen, grid.pipeline.ranks[-1], group=grid.pipeline.group)
        return [int(token) for token in chosen.tolist()]


def _check_layout(built: BuiltModule, grid: Grid) -> None:
    tp = built.context.tp
    if tp.splits_sequence or grid.context.size > 1:
        name = "sequence" if tp.splits_sequence else "context"
        raise TopologyError(
            f"parallel.{name} divides sequences, and a sequence of one token cannot be divided; try tensor and "
            "pipeline ranks alone"
        )
    if any(hasattr(parameter, "ds_id") for parameter in built.module.parameters()):
        raise TopologyError("ZeRO-3 divides the weights, which would be gathered for each token; try ZeRO-1")


def decoding_of(core: ModelConfig) -> Decoding:
    """Return the part of a model that generates text.

    Raises:
        ConfigError: it does not generate text.
    """
    if core.decoding is None:
        raise ConfigError(
            f"a {core.family} without a head for the next token does not generate text; try a causal or an "
            "encoder-decoder model"
        )
    return core.decoding


def check_prompts(core: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that a model cannot continue.

    Raises:
        ConfigError: `max_new_tokens` is less than 1.
        DataError: a prompt is empty, has ids that the model does not have, or is too long with its new tokens.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} adds nothing; nearest: 1")
    limit = core.shape().max_positions
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} has no tokens; try a text, or a tokenizer that adds a first token")
        if max(prompt) >= core.vocab_size:
            raise DataError(
                f"prompt {number} has id {max(prompt)}, and the model's vocab_size={core.vocab_size} ends at "
                f"{core.vocab_size - 1}; use the model's own tokenizer"
            )
        if limit is not None and len(prompt) + max_new_tokens > limit:
            room = limit - len(prompt)
            fix = f"nearest: {room}" if room > 0 else "try a shorter prompt"
            raise DataError(
                f"max_new_tokens={max_new_tokens} after the {len(prompt)} tokens of prompt {number} is beyond the "
                f"model's {limit} positions; {fix}"
            )


def _positions(padding: Sequence[int], capacity: int, device: torch.device) -> Tensor | None:
    """Return (B, capacity) positions of rows behind padding, which is a document of its own; None = no padding."""
    if not any(padding):
        return None
    starts = torch.tensor(padding, device=device)[:, None]
    places = torch.arange(capacity, device=device)[None]
    return torch.where(places < starts, places, places - starts)


def end_of(row: Row, end_ids: Sequence[int], is_stop: IsStop | None, max_new_tokens: int) -> str:
    """Return what ends a row after its last token; empty = it has not ended."""
    if row.ids[-1] in end_ids:
        return "end"
    if is_stop is not None and is_stop(row.ids):
        return "stop"
    return "length" if len(row.ids) == max_new_tokens else ""
