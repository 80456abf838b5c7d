"""This rank's layers of a model whose rows are continued, with the hidden states that pipeline stages exchange."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.engine import BuiltModule
from megatron_ds.models.config import Decoding
from megatron_ds.models.sequential import HIDDEN, input_activations
from megatron_ds.parallel.grid import Grid


class Stage:
    """A pipeline stage, or a full model.

    All ranks have the columns of ids, so that only hidden states are sent: (S, B, H) for S new positions, from each
    stage to the next. Those of an encoder are sent once and kept.

    Args:
        built: the module of this rank.
        decoding: the part of the model that runs for each token.
        grid: the place of this rank.
        width: H.
    """

    def __init__(self, built: BuiltModule, decoding: Decoding, grid: Grid, width: int) -> None:
        self._built, self._column, self._pipeline, self._width = built, decoding.column, grid.pipeline, width
        self._start = [spec.name for spec in built.specs].index(decoding.first_layer)
        self._dtype = next(built.module.parameters()).dtype
        self._device = next(built.module.parameters()).device
        self._kept: dict[str, Tensor] = {}

    @property
    def is_last(self) -> bool:
        """This rank has the output head."""
        return self._pipeline.rank == self._pipeline.size - 1

    def run(self, columns: Mapping[str, Tensor], *, begins: bool) -> Tensor | None:
        """Run the layers on new positions, and return the logits of the last one, (B, V) fp32, on the last stage.

        Collective over pipeline and tensor.

        Args:
            columns: (B, ...) each, on the device: those of the batch, and the new positions of the ids that grow.
            begins: the rows begin; else what does not grow is known from earlier calls.
        """
        built = self._built
        end = built.first + len(built.layers)
        first = built.first if begins else max(built.first, self._start)
        if first >= end:
            return None
        activations = input_activations(columns, built.specs[first].columns)
        if not begins:
            activations |= self._kept
        if first > (0 if begins else self._start):
            activations |= self._receive(first, columns, begins)
        head = built.layers[-1] if end == len(built.specs) else None
        for layer in built.layers[first - built.first : len(built.layers) - (head is not None)]:
            activations = layer(activations)
        if begins:
            constant = {name for spec in built.specs for name, column in spec.hidden.items() if column != self._column}
            self._kept = {name: activations[name] for name in constant - {HIDDEN} if name in activations}
        if head is not None:
            return head(activations)["logits"][:, -1].float()
        for name in self._moving(end, begins):
            dist.send(activations[name].contiguous(), self._pipeline.ranks[self._pipeline.rank + 1])
        return None

    def _moving(self, boundary: int, begins: bool) -> list[str]:
        """Return the names of the hidden states that cross a boundary, the index of the layer behind it."""
        if not begins and boundary <= self._start:
            return []
        hidden = self._built.specs[boundary].hidden
        return [name for name, column in hidden.items() if begins or column == self._column]

    def _receive(self, first: int, columns: Mapping[str, Tensor], begins: bool) -> dict[str, Tensor]:
        found = {}
        for name in self._moving(first, begins):
            batch, length = columns[self._built.specs[first].hidden[name]].shape
            found[name] = torch.empty(length, batch, self._width, dtype=self._dtype, device=self._device)
            dist.recv(found[name], self._pipeline.ranks[self._pipeline.rank - 1])
        return found
