"""The invertible operation between Hugging Face tensors, one for each index of an axis, and one native parameter.

Checkpoints of mixtures of experts store each expert's tensors by themselves. The operation is that of one expert, and
its axis is spread over the names:

    Spread(Op(("m h", "m h"), native="* m h"), axis="x", count=8)                   native: "x * m h"

A shard of that axis is a range of tensors, so a rank opens the tensors of its own experts only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.hf.tensor_mapping import FusedPiece, Op, Reader, Sizes, allocate


@dataclass(frozen=True)
class Spread:
    """A bijection between `count` times the tensors of one operation and one native parameter. It is used like an `Op`.

    Sources are ordered by index, then as in `one`: gate and up of the first expert, gate and up of the second.

    Attributes:
        one: the operation of one index; its sources are full tensors.
        axis: the axis that the names are spread over, the slowest of the native parameter.
        count: its size.
    """

    one: Op
    axis: str
    count: int

    def __post_init__(self) -> None:
        assert self.axis not in self.one.native_axes, f"{self}: {self.axis} is an axis of each tensor"
        assert not any(map(self.one.is_piece, range(len(self.one.sources)))), f"{self}: a tensor has several pieces"

    @property
    def sources(self) -> tuple[str | FusedPiece, ...]:
        """Patterns of all tensors."""
        return self.one.sources * self.count

    @property
    def native(self) -> str:
        """Pattern of the native parameter."""
        return f"{self.axis} {self.one.native}"

    @property
    def native_axes(self) -> list[str]:
        """Names of all axes of the native parameter, slowest first."""
        return [self.axis, *self.one.native_axes]

    @property
    def is_run(self) -> bool:
        """No view covers several tensors."""
        return False

    def is_piece(self, source: int) -> bool:
        """Test whether a source is a piece of a fused tensor; none is."""
        return False

    def source_shape(self, source: int, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of one Hugging Face tensor."""
        return self.one.source_shape(self._within(source), sizes)

    def is_first_dim(self, axis: str) -> bool:
        """Test whether an axis is the first dim of every source; no source has the spread axis."""
        return axis != self.axis and self.one.is_first_dim(axis)

    def native_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of the full native parameter."""
        assert sizes[self.axis] == self.count, (self, sizes)
        return (self.count, *self.one.native_shape(sizes))

    def split_dim(self, axis: str | None) -> int | None:
        """Return the native dim whose slowest axis is `axis`: the only one that may be divided is the spread one."""
        assert axis in (None, self.axis), f"axis {axis!r} is not {self.axis!r}"
        return None if axis is None else 0

    def read(
        self,
        reader: Reader,
        sizes: Sizes,
        axis: str | None = None,
        start: int = 0,
        stop: int = 0,
        *,
        place: Tensor | None = None,
    ) -> Tensor:
        """Read the native parameter, or the shard [start, stop) of the spread axis; opens no tensor outside the shard.

        Tensors of different dtypes are stacked in a dtype that holds all of them.

        Args:
            place: bytes that the tensors are copied to, if they suffice; None = new memory.
        """
        assert axis in (None, self.axis), f"axis {axis!r} is not {self.axis!r}"
        indices = range(self.count) if axis is None else range(start, stop)
        each = len(self.one.sources)
        shape = (len(indices), *self.one.native_shape(sizes))
        full: Tensor | None = None
        for slot, index in enumerate(indices):
            for within in range(each):
                tensor = reader(index * each + within)
                if full is None:
                    full = allocate(shape, tensor.dtype, place)
                elif tensor.dtype != full.dtype:
                    full = full.to(torch.promote_types(tensor.dtype, full.dtype))
                self.one.read_source(within, tensor, full[slot], sizes)
        return full if full is not None else torch.empty(shape)

    def write(self, source: int, native: Tensor, sizes: Sizes) -> Tensor:
        """Return one Hugging Face tensor of a full native parameter, as a view if possible; the inverse of `read`."""
        return self.one.write(self._within(source), native[source // len(self.one.sources)], sizes)

    def slot(self, source: int, native: Tensor, sizes: Sizes) -> Tensor:
        """View the part of a native parameter that one source holds, with one dim per axis."""
        return self.one.slot(self._within(source), native[source // len(self.one.sources)], sizes)

    def write_piece(self, source: int, native: Tensor, sizes: Sizes, fused: Tensor) -> None:
        """No source is a piece of a fused tensor."""
        raise AssertionError(f"{self}: source {source} is a full tensor")

    def _within(self, source: int) -> int:
        """Return a source's index within the operation of one index."""
        return source % len(self.one.sources)


Mapped = Op | Spread
"""An operation between Hugging Face tensors and one native parameter."""
