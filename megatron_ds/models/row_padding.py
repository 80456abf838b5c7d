"""Rows of a length that the ranks which divide them cannot share evenly: padded, masked out and without labels.

Positions are added on the right, where no earlier position sees them with causality; the mask hides them from others,
from means over a text, and from the balance of experts. Labels are counted before, in the rows as the data have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.columns import ATTENTION_MASK, COLUMNS, DECODER_INPUT_IDS, INPUT_IDS, find_column
from megatron_ds.errors import DataError
from megatron_ds.models.sequential import HeadSpec

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class RowPadding:
    """Padding of the rows of micro-batches, and of what a model returns for them.

    Attributes:
        multiple_of: divisor of the lengths that the ranks can share; 1 = they share every length.
        head: the declaration of the output head, for which ids may need a certain padding.
        rope: the model's rope type that depends on the length of a row, which forbids padding; None = no such type.
    """

    multiple_of: int
    head: HeadSpec
    rope: str | None = None

    def pad(self, batch: Batch) -> Batch:
        """Pad the columns with an entry a position, (B, S) -> (B, S') and (B, T) -> (B, T'), to the next multiples.

        An attention mask is added to a batch without one. A batch of fitting lengths is returned as it is.

        Args:
            batch: columns by name, on the host or a device.

        Raises:
            DataError: the model cannot tell padding from text, or a label of each position is of no declared column.
        """
        lengths = {name: column.shape[1] for name, column in batch.items() if _has_positions(name, column, batch)}
        missing = {name: -length % self.multiple_of for name, length in lengths.items()}
        if not any(missing.values()):
            return batch
        if self.rope is not None:
            name = next(name for name, count in missing.items() if count)
            raise DataError(
                f"{name} has {lengths[name]} positions, and {self.multiple_of} does not divide them: they would be "
                f"padded, and the model's rope type {self.rope} depends on the length; try "
                f"{lengths[name] + missing[name]} positions"
            )
        padded = {name: _padded(name, column, missing.get(name, 0), self.head) for name, column in batch.items()}
        if missing.get(INPUT_IDS.name) and ATTENTION_MASK.name not in batch:
            ids = padded[INPUT_IDS.name]
            seen = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
            seen[:, lengths[INPUT_IDS.name] :] = False
            padded[ATTENTION_MASK.name] = seen.pin_memory() if ids.is_pinned() else seen
        return padded

    def cut(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Cut outputs of each position of the last stack, (B, S', ...), to the length of the batch; others stay."""
        ids = batch.get(DECODER_INPUT_IDS.name, batch.get(INPUT_IDS.name))
        if ids is None:
            return dict(outputs)
        length = ids.shape[1]
        whole = length + -length % self.multiple_of
        return {
            name: output[:, :length] if output.dim() > 2 and output.shape[1] == whole else output
            for name, output in outputs.items()
        }


def _has_positions(name: str, column: Tensor, batch: Batch) -> bool:
    """Return whether a column has an entry for each position; without a declaration, by its shape and type."""
    if name in COLUMNS:
        return find_column(name).has_positions
    ids = batch.get(INPUT_IDS.name)
    is_long = ids is not None and column.dim() > 1 and column.shape[1] == ids.shape[1]
    return is_long and (column.dim() > 2 or not column.is_floating_point())


def _padded(name: str, column: Tensor, missing: int, head: HeadSpec) -> Tensor:
    """Return a column with some more positions, (B, S, ...) -> (B, S + missing, ...)."""
    if not missing:
        return column
    shape = (column.shape[0], missing, *column.shape[2:])
    more = column.new_full(shape, 0)
    if name == INPUT_IDS.name:
        more.fill_(_padding_id(column, head))
    elif name in COLUMNS:
        fill = find_column(name).fill
        more = more + torch.arange(missing, device=more.device) if fill is None else more.fill_(fill)
    elif name in head.label_columns and not column.is_floating_point():
        raise DataError(
            f"labels {name} have {column.shape[1]} positions, which the context ranks cannot share, and no declaration "
            "says how they are padded; try megatron_ds.columns.declare, or another length"
        )
    found = torch.cat([column, more], dim=1)
    return found.pin_memory() if column.is_pinned() else found


def _padding_id(ids: Tensor, head: HeadSpec) -> int:
    if head.padding_id is None:
        raise DataError(
            f"input_ids have {ids.shape[1]} positions, which the context ranks cannot share, and the head reads the "
            "last one, because the model has no id of padding; try pad_token_id in config.json, or another length"
        )
    return head.padding_id
