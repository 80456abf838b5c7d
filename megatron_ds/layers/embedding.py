"""Word embedding divided over the vocabulary, and learned positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.errors import DataError
from megatron_ds.layers.param_spec import ParamSpec, make_parameter, over_tensor
from megatron_ds.parallel.tensor import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Look up rows of a table whose rows are divided over the tensor axis (Shoeybi et al. 2019, section 3).

    ids (S, B) -> (S, B, E), or (S/t, B, E) under sequence parallelism. Forward: all-reduce or reduce-scatter. Backward:
    nothing, or an all-gather. If t does not divide V, the last ranks hold zero rows that no id reads.

    Args:
        vocab_size, size: V, E.
        tp: the tensor axis.
        std: standard deviation of the table's initialisation.
        padding_id: the id whose row gets no gradient here, though it may from a tied head; None = no such id.
    """

    def __init__(
        self, vocab_size: int, size: int, tp: TensorParallel, *, std: float, padding_id: int | None = None
    ) -> None:
        super().__init__()
        self.tp = tp
        spec = ParamSpec((vocab_size, size), over_tensor(0), std=std)
        self.weight = make_parameter(spec, tp.axes)
        (self.start, self.stop), _ = spec.local_ranges(tp.axes)
        is_here = padding_id is not None and self.start <= padding_id < self.stop
        self.padding_row = padding_id - self.start if padding_id is not None and is_here else None

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp.axis.size == 1:
            return F.embedding(ids, self.weight, self.padding_row)
        elsewhere = (ids < self.start) | (ids >= self.stop)
        rows = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight, self.padding_row)
        return self.tp.leave(rows.masked_fill(elsewhere[..., None], 0.0))


@dataclass(frozen=True)
class PositionTable:
    """A table of learned positions.

    Attributes:
        max_positions: the number of positions.
        offset: the number of rows before the first position's (OPT has 2).
        skips_padding: positions count only the tokens in the key mask (OPT).
        skipped_id: positions count only tokens that differ from this id (RoBERTa). Tokens with this id get the row
            before the first position's, which is not trained.
    """

    max_positions: int
    offset: int = 0
    skips_padding: bool = False
    skipped_id: int | None = None

    @property
    def rows(self) -> int:
        return self.max_positions + self.offset


class LearnedPositions(nn.Module):
    """Add a learned vector per position: (S, B, H) -> same; or (S/t, B, H) -> same under sequence parallelism.

    Args:
        table: the rows and how positions select them.
        hidden_size: H.
        tp: the tensor axis.
        std: standard deviation of the table's initialisation.
    """

    def __init__(self, table: PositionTable, hidden_size: int, tp: TensorParallel, *, std: float) -> None:
        super().__init__()
        self.table, self.tp = table, tp
        self.weight = make_parameter(ParamSpec((table.rows, hidden_size), std=std), tp.axes)

    def forward(self, x: Tensor, counted: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Add the vectors of the positions to x.

        Args:
            x: (S, B, H), or (S/t, B, H).
            counted: (B, S), nonzero at the tokens that positions count, if the table skips any.
            positions: (B, S); None = 0..S-1, or the number of `counted` tokens before each.
        """
        table, weight = self.table, self.tp.between(self.weight)
        length = self.tp.full_length(x)
        local = self.tp.positions(length, x.device)
        if positions is not None:
            return x + F.embedding(positions.t()[local] + table.offset, weight)
        if counted is None or not (table.skips_padding or table.skipped_id is not None):
            return x + self._rows(weight, length)[local, None, :]
        seen = counted.long()
        before_first = table.offset - 1
        rows = seen.cumsum(1) * seen + before_first  # others get the row before the first position's
        if self._reaches_beyond(length):
            rows = rows.clamp_max(table.rows - 1)
        return x + F.embedding(rows.t()[local], weight, before_first if table.skipped_id is not None else None)

    def _rows(self, weight: Tensor, length: int) -> Tensor:
        """Return the rows of positions 0..S-1; padding beyond the table has the last position's."""
        rows = weight[self.table.offset :]
        if not self._reaches_beyond(length):
            return rows
        return torch.cat([rows, rows[-1:].expand(length - len(rows), -1)])

    def _reaches_beyond(self, length: int) -> bool:
        """Return whether the padding that makes a sequence divisible by context ranks reaches beyond the table.

        Raises:
            DataError: the sequence is longer than padding explains.
        """
        missing = length - self.table.max_positions
        if missing >= self.tp.padded_to:
            raise DataError(
                f"a sequence has {length} positions, and the model's table has {self.table.max_positions}; try shorter "
                "sequences"
            )
        return missing > 0


class TokenTypes(nn.Module):
    """Add a learned vector per segment: (S, B, H) -> same; or (S/t, B, H) -> same under sequence parallelism.

    Args:
        num_types, hidden_size: rows of the table, H.
        tp: the tensor axis.
        std: standard deviation of the table's initialisation.
    """

    def __init__(self, num_types: int, hidden_size: int, tp: TensorParallel, *, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = make_parameter(ParamSpec((num_types, hidden_size), std=std), tp.axes)

    def forward(self, x: Tensor, types: Tensor | None = None) -> Tensor:
        """Add the vectors of the segments `types`, (B, S), to x; None = every token is in segment 0."""
        weight = self.tp.between(self.weight)
        if types is None:
            return x + weight[0]
        return x + F.embedding(types.t()[self.tp.positions(self.tp.full_length(x), x.device)], weight)


def scaled(x: Tensor, factor: float, in_dtype: bool) -> Tensor:
    """Return x * factor; `in_dtype` rounds the factor to the dtype of x first, as Gemma was trained."""
    if factor == 1.0:
        return x
    # filled on the device: a number of the host would be copied there in each forward pass
    return x * torch.full((), factor, dtype=x.dtype, device=x.device) if in_dtype else x * factor
