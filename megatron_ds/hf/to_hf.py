"""Conversion of native parameters to the tensors of a Hugging Face directory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_ds.hf.family import Part, Row
from megatron_ds.hf.tensor_mapping import FusedPiece, allocate, tile


class Tables(Protocol):
    """A table of native parameters and its axes: of a model, or of its adapters."""

    @property
    def table(self) -> dict[str, Row]:
        """Native name -> row."""

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`."""


class ToHF:
    """Conversion of full native parameters to Hugging Face tensors, one parameter at a time, in any order.

    A fused tensor is complete when its last piece is added, so add the pieces of one tensor close to each other.

    Args:
        model: the tables.
        reuse: a fused tensor may reuse the memory of the one before; the caller must be done with that.
    """

    def __init__(self, model: Tables, *, reuse: bool = False) -> None:
        self.model, self._reuse = model, reuse
        assert_each_once(model.table)
        self._missing = Counter(
            theirs for row in model.table.values() for source, theirs in enumerate(row.names) if row.op.is_piece(source)
        )
        self._fused: dict[str, Tensor] = {}
        self._place: Tensor | None = None

    def add(self, name: str, full: Tensor, expert: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Add one native parameter; yields the tensors that are now complete, which may be views of it.

        Args:
            name: native name.
            full: the full parameter, or that of one expert, without the dim of the experts.
            expert: index of this expert, whose tensors are stored one by one; None = the complete parameter.
        """
        row, sizes = self.model.table[name].of(expert), self.model.axis_sizes
        for source, theirs in enumerate(row.names):
            if not row.op.is_piece(source):
                for one in (theirs, *row.copies):
                    yield one, row.op.write(source, full, sizes)
                continue
            if theirs not in self._fused:
                self._fused[theirs] = self._begin(row.op.source_shape(source, sizes), full)
            row.op.write_piece(source, full, sizes, self._fused[theirs])
            self._missing[theirs] -= 1
            if self._missing[theirs] == 0:
                yield theirs, self._fused[theirs]
                self._end(self._fused.pop(theirs))

    def order(self, parts: Iterable[Part]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of the tensors in the order in which adding these parts completes them."""
        missing = self._missing.copy()
        for part in parts:
            row = self.model.table[part.name].of(part.expert)
            for source, theirs in enumerate(row.names):
                missing[theirs] -= row.op.is_piece(source)
                if not missing[theirs] or not row.op.is_piece(source):
                    for one in (theirs, *row.copies):
                        yield one, row.op.source_shape(source, self.model.axis_sizes)

    def _begin(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if not self._reuse:
            return like.new_empty(shape)
        place, self._place = self._place, None
        return allocate(shape, like.dtype, place)

    def _end(self, fused: Tensor) -> None:
        if self._reuse:
            self._place = torch.empty(0, dtype=torch.uint8).set_(fused.untyped_storage())


def assert_each_once(table: Mapping[str, Row]) -> None:
    """Assert that every element of every Hugging Face tensor is in exactly one native parameter."""
    uses: dict[str, list[str | FusedPiece]] = defaultdict(list)
    for row in table.values():
        assert len(row.names) == len(row.op.sources) and (len(set(row.names)) == 1 or not row.op.is_run), row
        for name, source in zip(row.names, row.op.sources):
            uses[name].append(source)
    for name, sources in uses.items():
        assert tile(sources), f"{name} is not the sum of {sources}"
